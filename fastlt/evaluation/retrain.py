"""A new linear classifier on a backbone that stands still, beside which a masked one is judged.

The paper (arXiv 2410.15980) drops the rows of auxiliaries from the trained head, and compares that
with a classifier that is trained again on the targets alone. Ours is the minimum of the balanced
cross entropy with weight decay, over the features of all training images of the targets without
augmentation: it has neither learning rate nor epochs, and its strength is the weight decay.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim import LBFGS

from fastlt.evaluation.posthoc import BLOCK, Method, Seen

DECAYS = np.geomspace(1e-6, 1e-1, 6)
ITERATIONS = 200  # of L-BFGS, at most


class Retrained:
    """The classifiers of each weight decay, each fitted when it is first asked for.

    features (n, D) float32 and labels (n,) int64 of training images of the targets; log_prior (T,).
    """

    def __init__(self, features: Tensor, labels: Tensor, log_prior: Tensor) -> None:
        self.scale = features.square().mean().sqrt().clamp(min=1e-12)
        self.features, self.labels, self.log_prior = features / self.scale, labels, log_prior
        self.heads: dict[float, tuple[Tensor, Tensor]] = {}

    def logits(self, seen: Seen, decay: float) -> Tensor:
        """Return the logits (n, T) of what was seen, without the prior."""
        if decay not in self.heads:
            self.heads[decay] = self.fit(decay)
        return F.linear(seen.values / self.scale, *self.heads[decay])

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, decay: float) -> tuple[Tensor, Tensor]:
        """Return the weight (T, D) and bias (T,) of the least loss."""
        classes, width = len(self.log_prior), self.features.shape[1]
        weight = self.features.new_zeros(classes, width).requires_grad_()
        bias = self.features.new_zeros(classes).requires_grad_()
        search = LBFGS(
            [weight, bias],
            max_iter=ITERATIONS,
            tolerance_grad=1e-6,
            tolerance_change=1e-10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            search.zero_grad()
            total = 0.5 * decay * weight.square().sum()
            total.backward()
            for start in range(0, len(self.labels), BLOCK):  # whose logits are held at a time
                part = slice(start, start + BLOCK)
                logits = F.linear(self.features[part], weight, bias) + self.log_prior
                loss = F.cross_entropy(logits, self.labels[part], reduction="sum")
                loss = loss / len(self.labels)
                loss.backward()
                total = total.detach() + loss.detach()
            return total

        search.step(closure)
        return weight.detach(), bias.detach()


def retraining(features: Tensor, labels: Tensor, log_prior: Tensor) -> Method:
    """Return the post-hoc method of a classifier that is trained again."""
    return Method(Retrained(features, labels, log_prior).logits, DECAYS, True)
