"""Latent features that all classes share, reconstructed and semantically augmented."""

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import MethodConfig, NotNegative, Several
from fastlt.errors import UserError
from fastlt.losses import Step
from fastlt.methods.method import Base
from fastlt.models.classifier import Classifier
from fastlt.models.heads import Head, LinearHead

FULL_UP_TO = 512  # features, up to which covariances are full matrices


class Latents(NamedTuple):
    """What the bank says of a batch of B images with P positions."""

    positions: Tensor  # (B, P, D), the features of the map
    shares: Tensor  # (B, P, N), of each latent in a position
    rebuilt: Tensor  # (B, P, D), the position out of latents


class LatentClassifier(Classifier):
    """A classifier whose head sees the pooled features, and those that the bank rebuilds."""

    def __init__(self, backbone: nn.Module, head: Head, bank: Tensor, sees_latents: bool) -> None:
        super().__init__(backbone, head)
        self.bank = nn.Parameter(bank.detach().clone())  # (N, D)
        self.sees_latents = sees_latents

    def features(self, images: Tensor) -> Tensor:
        """Return the features (B, 2 D) of images (B, 3, H, W), or (B, D) without the latents."""
        return self.seen(images)[0]

    def with_latents(self, images: Tensor) -> tuple[Tensor, Latents]:
        """Return the logits (B, C) of images, and what the bank says of them."""
        features, found = self.seen(images)
        return self.head(features), found

    def seen(self, images: Tensor) -> tuple[Tensor, Latents]:
        """Return the features of images, and what the bank says of them."""
        maps = self.maps(images)
        features, positions = self.pool(maps), maps.flatten(2).transpose(1, 2)
        found = latents_of(positions, self.bank)
        if self.sees_latents:
            features = torch.cat([features, found.rebuilt.mean(dim=1)], dim=1)
        return features, found

    def predicting(self, targets: int) -> "LatentClassifier":
        """Return a model of the same backbone and bank with a head of the targets alone."""
        return LatentClassifier(
            self.backbone, self.head.of_targets(targets), self.bank, self.sees_latents
        )


def latents_of(positions: Tensor, bank: Tensor) -> Latents:
    """Return the shares of a bank (N, D) in positions (B, P, D): softmax of products / sqrt(D)."""
    shares = (positions @ bank.T / math.sqrt(bank.shape[1])).softmax(dim=2)
    return Latents(positions, shares, shares.to(bank.dtype) @ bank)


def reconstruction_loss(found: Latents, bank: Tensor, detach: bool) -> Tensor:
    """Return the mean squared distance () of positions and what is rebuilt of them by the bank.

    detach: whether the positions stand still, so that the bank (N, D) alone is moved. Else features
    could fall to zero.
    """
    if detach:  # in the shares too, by which the loss would move the features as well
        found = latents_of(found.positions.detach().to(bank.dtype), bank)
    return (found.positions.float() - found.rebuilt.float()).square().sum(dim=2).mean()


def latent_features(found: Latents) -> Tensor:
    """Return the mean of the positions of each latent, weighted by its shares, (B, N, D)."""
    shares = found.shares.float()
    total = shares.sum(dim=1)[..., None].clamp(min=1e-12)
    return torch.einsum("bpn,bpd->bnd", shares, found.positions.float()) / total


def augmented_logits(samples: Tensor, rows: Tensor, covariance: Tensor, strength: Tensor) -> Tensor:
    """Return the logits (B, N, N) of infinitely many samples around samples (B, N, D).

    Latent n is moved by its covariance S_n, (N, D, D) or its diagonal (N, D): the closed form of
    ISDA (Wang et al. 2019, arXiv 1909.12220), v_j g_n + strength / 2 (v_j - v_n)' S_n (v_j - v_n).
    """
    apart = rows[None] - rows[:, None]  # (n, j, D)
    if covariance.ndim == 3:
        spread = (apart @ covariance * apart).sum(dim=2)
    else:
        spread = (apart.square() * covariance[:, None]).sum(dim=2)
    return samples @ rows.T + strength / 2 * spread


class Method(Base):
    """After the idea of recognition by class-agnostic latent categories.

    The paper's: latent features that head and tail share, learned by reconstruction, and semantic
    augmentation of the latent features. What reconstructs them, the head on both, the weights and
    the size of the bank are ours; the closed form of the augmentation, its strength that grows with
    the epochs and its running covariance are ISDA's.
    """

    PAPER = "Liu et al. 2022, arXiv 2206.01010"
    means: Tensor  # (N, D), of the latents' features so far
    covariance: Tensor  # (N, D, D), or its diagonal (N, D)
    samples: Tensor  # (), images that they are of
    usage: Tensor  # (N,), sums of shares in this epoch
    epoch: Tensor  # (), that epoch
    strength: Tensor  # (), of the augmentation
    rebuilt: Tensor  # (), sum of the reconstruction losses of this epoch's batches
    batches: Tensor  # (), that they are of

    class Config(MethodConfig):
        """The numbers of latent categories; the strength is ISDA's, the others are ours."""

        name: str = "lcreg"
        """lcreg."""
        latents: Several = 64
        """Latent features in the bank; 256 for data sets of many more than 100 classes."""
        reconstruction_weight: NotNegative = 0.1
        """Weight of the reconstruction in the loss."""
        latent_weight: NotNegative = 0.1
        """Weight of the latents' classification in the loss."""
        strength: NotNegative = 0.5
        """Strength of the semantic augmentation in the last epoch."""
        detach: bool = True
        """Whether the reconstruction moves the bank alone, and not the features."""
        sees_latents: bool = True
        """Whether the head sees what is rebuilt beside the features."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with a bank, and a head of twice as many features."""
        if type(model.head) is not LinearHead:
            raise UserError("method.name=lcreg has a head of its own: set model.head=linear")
        classes, features = model.head.weight.shape
        head = LinearHead(2 * features, classes) if config.sees_latents else model.head
        bank = torch.randn(config.latents, features)
        return LatentClassifier(model.backbone, head, bank, config.sees_latents)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        bank: Tensor = self.model.bank  # type: ignore[assignment]
        count, width = bank.shape
        self.rows = nn.Parameter(torch.randn_like(bank) / math.sqrt(width))  # the latent head
        square = (count, width, width) if width <= FULL_UP_TO else (count, width)
        for name, shape in (
            ("means", (count, width)),
            ("covariance", square),
            ("samples", ()),
            ("usage", (count,)),
            ("strength", ()),
            ("rebuilt", ()),
            ("batches", ()),
        ):
            self.register_buffer(name, torch.zeros(shape))
        self.register_buffer("epoch", torch.full((), -1))

    def begin(self, epoch: int) -> Hashable:
        """Set the strength of the augmentation, and count the latents' usage anew."""
        self.strength.fill_(self.config.strength * epoch / self.task.epochs)
        if int(self.epoch) != epoch:  # not where a run goes on amid an epoch
            for sums in (self.usage, self.rebuilt, self.batches):
                sums.zero_()
            self.epoch.fill_(epoch)
        return super().begin(epoch)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        model: Any = self.model
        logits, found = model.with_latents(images)
        with torch.autocast(images.device.type, enabled=False):
            rebuilt = reconstruction_loss(found, model.bank, self.config.detach)
            latent = self.latent_loss(latent_features(found))
        self.count(found.shares, rebuilt)
        loss = self.loss(logits, target, target_b, mix)
        loss = loss + self.config.reconstruction_weight * rebuilt
        loss = loss + self.config.latent_weight * latent
        return self.scored(loss, logits, target, target_b, mix)

    def latent_loss(self, samples: Tensor) -> Tensor:
        """Return the cross entropy () by which latents tell their features (B, N, D) apart."""
        self.observe(samples)
        logits = augmented_logits(samples, self.rows, self.covariance, self.strength)
        latent = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return F.cross_entropy(logits.flatten(0, 1), latent.flatten())

    @torch.no_grad()
    def observe(self, samples: Tensor) -> None:
        """Merge features (B, N, D) into the running means and biased covariances."""
        self.samples += len(samples)
        weight = len(samples) / self.samples
        mean = samples.mean(dim=0)
        away, shift = samples - mean, mean - self.means
        if self.covariance.ndim == 3:
            within = torch.einsum("bnd,bne->nde", away, away) / len(samples)
            between = shift[:, :, None] * shift[:, None, :]
        else:
            within, between = away.square().mean(dim=0), shift.square()
        self.covariance += weight * (within - self.covariance + (1 - weight) * between)
        self.means += weight * shift

    @torch.no_grad()
    def count(self, shares: Tensor, rebuilt: Tensor) -> None:
        """Add the shares (B, P, N) of a batch and its reconstruction loss () to the epoch's."""
        self.usage += shares.float().mean(dim=1).sum(dim=0)
        self.rebuilt += rebuilt
        self.batches += 1

    def metrics(self) -> dict[str, float]:
        """Return the epoch's mean reconstruction loss, and the entropy of the latents' usage.

        The entropy, of the mean usage, is in nats.
        """
        share = self.usage / self.usage.sum().clamp(min=1e-12)
        return {
            "latent_entropy": float(torch.special.entr(share).sum()),
            "reconstruction": float(self.rebuilt / self.batches.clamp(min=1)),
        }
