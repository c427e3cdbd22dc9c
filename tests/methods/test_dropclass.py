"""Class dropping, held to its formulas, class by class."""

from dataclasses import replace

import pytest
import torch
from helpers.method_cases import QUIET, batch_of, config_of, prepared, trained
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fastlt.data.augment import normalise
from fastlt.data.plan import evaluation_batches
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluation_geometry
from fastlt.methods.dropclass import Method, importance_of
from fastlt.models.classifier import build_model
from fastlt.training.loaders import val_loader
from fastlt.training.loop import fit


@pytest.fixture
def trainer(small_pack, tmp_path):
    with prepared(small_pack, tmp_path / "run", "dropclass", "train.epochs=4") as trainer:
        yield trainer


@pytest.mark.parametrize("seed", range(3))
def test_importance_is_the_mean_of_positive_weights_of_kept_classes(seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(7, 5, generator=generator, dtype=torch.float64)
    for dropped in range(7):
        kept = [rows[c].clamp(min=0) for c in range(7) if c != dropped]
        got = importance_of(rows, torch.tensor(dropped))
        torch.testing.assert_close(got, sum(kept) / 6)
        difference = 7 * importance_of(rows) - 6 * got
        torch.testing.assert_close(difference, rows[dropped].clamp(min=0))


def parts_of(trainer, images, dropped):
    """Return plain logits, and those of the drop branch, written out."""
    model = trainer.model
    maps, rows = model.maps(images), model.head.weight
    kept = [c for c in range(len(rows)) if c != dropped]
    importance = rows[kept].clamp(min=0).mean(dim=0)
    branch = F.relu(model.norm(model.mix(maps * importance[None, :, None, None])))
    return model.head(maps.mean(dim=(2, 3))), model.head(branch.mean(dim=(2, 3)))


def test_the_loss_is_its_three_parts_without_the_dropped_class(trainer):
    method = trainer.method
    images, target = batch_of(trainer, 10)
    for epoch, dropped in ((1, 0), (3, 4)):
        method.begin(epoch)
        loss, logits = method.dropping(torch.tensor(dropped), torch.tensor(True), images, target)
        plain, branch = parts_of(trainer, images, dropped)
        torch.testing.assert_close(logits, branch)
        others = target != dropped
        p = epoch / 4
        expected = (
            (1 - p) * method.loss(plain, target)
            + p * method.loss(branch[others], target[others])
            + 10 * branch.softmax(dim=1)[:, dropped].mean()
        )
        torch.testing.assert_close(loss, expected)


def test_mixed_labels_are_left_out_one_by_one(trainer):
    method = trainer.method
    images, target = batch_of(trainer, 10)
    target_b, mix = target.flip(0), torch.tensor(0.3)
    method.begin(2)
    loss, _ = method.dropping(torch.tensor(1), torch.tensor(True), images, target, target_b, mix)
    plain, branch = parts_of(trainer, images, 1)
    one, other = (
        torch.stack([method.loss(branch[i : i + 1], t[i : i + 1]) for i in range(10)])
        for t in (target, target_b)
    )
    share = 0.3 * (target != 1) + 0.7 * (target_b != 1)
    kept = (0.3 * one * (target != 1) + 0.7 * other * (target_b != 1)).sum() / share.sum()
    expected = (
        0.5 * method.loss(plain, target, target_b, mix)
        + 0.5 * kept
        + 10 * branch.softmax(dim=1)[:, 1].mean()
    )
    torch.testing.assert_close(loss, expected)


def test_where_nothing_is_dropped_nothing_is_left_out_or_suppressed(trainer):
    method, model = trainer.method, trainer.model
    images, target = batch_of(trainer, 10)
    method.begin(2)
    loss, logits = method.dropping(torch.tensor(1), torch.tensor(False), images, target)
    plain = model.head(model.pool(model.maps(images)))
    torch.testing.assert_close(
        logits, model.branch(model.maps(images), importance_of(model.head.weight))
    )
    torch.testing.assert_close(
        loss, 0.5 * method.loss(plain, target) + 0.5 * method.loss(logits, target)
    )


def test_before_the_ramp_it_is_the_plain_loss_exactly(trainer):
    method, model = trainer.method, trainer.model
    images, target = batch_of(trainer)
    method.begin(0)
    step = method(images, target)
    plain = method.loss(model.head(model.pool(model.maps(images))), target)
    assert torch.equal(step.loss, plain)
    step.loss.backward()
    assert model.mix.weight.grad.abs().max() == 0


def test_a_batch_of_the_dropped_class_alone_has_no_drop_loss(trainer):
    method = trainer.method
    images, target = batch_of(trainer)[0], torch.full((8,), 2)
    method.begin(3)
    loss, branch = method.dropping(torch.tensor(2), torch.tensor(True), images, target)
    plain, _ = parts_of(trainer, images, 2)
    expected = 0.25 * method.loss(plain, target) + 10 * branch.softmax(dim=1)[:, 2].mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in method.parameters())


def test_classes_are_dropped_as_often_as_the_ramp_says_and_evenly(trainer, monkeypatch):
    method, seen = trainer.method, []

    def note(dropped, is_dropped, *rest):
        seen.append((int(dropped), bool(is_dropped)))
        return torch.zeros(()), torch.zeros(1, 5)

    monkeypatch.setattr(method, "dropping", note)
    method.begin(3)
    torch.manual_seed(0)
    for _ in range(10_000):
        method(torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert abs(sum(is_dropped for _, is_dropped in seen) / 10_000 - 0.75) < 0.02
    counts = torch.bincount(torch.tensor([dropped for dropped, _ in seen]), minlength=5)
    assert ((counts - 2000).double().square() / 2000).sum() < 18.5  # chi^2 of 4, p = 0.001


def test_with_an_identity_branch_it_predicts_as_the_plain_head(trainer):
    model = trainer.model.eval()
    images, _ = batch_of(trainer)
    nn.init.dirac_(model.mix.weight)
    model.norm = nn.Identity()
    model.importance.fill_(1)
    torch.testing.assert_close(model(images), model.head(model.backbone(images)))


def test_the_export_keeps_the_importance_of_all_classes(small_pack, tmp_path):
    run = trained(small_pack, tmp_path / "run", "dropclass", "optim.ema=0.3")
    newest = max((run / "checkpoints").iterdir())
    rows = load_file(newest / "ema.safetensors")["head.weight"]
    exported = load_file(run / "model.safetensors")
    assert exported["head.weight"].shape == (3, 64) and rows.shape == (5, 64)
    torch.testing.assert_close(exported["importance"], rows.clamp(min=0).mean(dim=0))


def probability_of_the_dropped(pack, run, *settings):
    """Return the mean probability of a class that is dropped, on the training images."""
    with prepared(
        pack, run, "dropclass", "train.epochs=30", "loss.silence=1", *settings
    ) as trainer:
        fit(trainer, QUIET)
        model, data = trainer.model.eval(), trainer.config.data
        loader = val_loader(data, replace(trainer.pack, val=trainer.pack.train), trainer.device)
        batches = evaluation_batches(trainer.pack.train, evaluation_geometry(data), 64)
        images = [normalise(pixels, data.mean, data.std) for _, pixels in loader.iterate(batches)]
        maps, found = model.maps(torch.cat(images)), []
        for dropped in range(trainer.space.num_classes):
            importance = importance_of(model.head.weight, torch.tensor(dropped))
            found.append(model.branch(maps, importance).softmax(dim=1)[:, dropped].mean().item())
        return sum(found) / len(found)


@pytest.mark.slow
def test_dropped_classes_lose_their_probability(small_pack, tmp_path):
    suppressed = probability_of_the_dropped(small_pack, tmp_path / "a")
    free = probability_of_the_dropped(small_pack, tmp_path / "b", "method.suppression=0")
    assert suppressed < 0.8 * free
    assert suppressed < 0.75 / 5  # of 5 classes


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (["model.head=cosine"], r"dropclass needs rows of a linear head"),
        (["loss.name=focal"], r"leaves labels out, which loss.name=focal does not know"),
    ],
)
def test_heads_and_losses_that_do_not_fit_are_refused(small_pack, tmp_path, setting, message):
    with (
        pytest.raises(UserError, match=message),
        prepared(small_pack, tmp_path / "run", "dropclass", *setting),
    ):
        pass


def test_build_needs_nothing_of_the_training(small_pack):
    config = config_of(small_pack, "dropclass")
    model = Method.build(config.method, build_model(config.model, 4, 16))
    assert model.importance.shape == (64,) and model.predicting(2).head.weight.shape == (2, 64)
