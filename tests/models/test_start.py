"""What heads start from: means of features, and texts."""

from importlib.util import find_spec

import pytest
import torch
from helpers.method_cases import prepared
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.errors import MissingExtra, UserError
from fastlt.models.heads import HEADS, section
from fastlt.models.start import class_vectors, start_from_means
from fastlt.models.text import texts_of
from fastlt.training.features import features_of
from fastlt.training.setup import start_stage
from fastlt.utils import torchvision_shim

CLASSES, WIDTH = 6, 8


def clusters(seed: int, each: int = 12):
    """Features around a mean for each class but the last, which has none."""
    draw = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(CLASSES, WIDTH, generator=draw) + 2
    labels = torch.arange(CLASSES - 1).repeat_interleave(each)
    return means[labels] + torch.randn(len(labels), WIDTH, generator=draw), labels


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["linear", "scaled", "batch-norm", "cosine"])
def test_a_start_from_means_predicts_as_the_nearest_mean(name, seed):
    features, labels = clusters(seed)
    head = HEADS[name].build(section()(head=name), WIDTH, CLASSES).eval()
    before = head.weight[-1].clone()
    start_from_means(head, features, labels)
    assert torch.equal(head.weight[-1], before)  # a class without images
    if name == "batch-norm":
        features = (features - features.mean(0)) / features.std(0)
    if name == "cosine":
        features = F.normalize(features, dim=1)
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES - 1)])
    if name == "cosine":
        expected = features @ F.normalize(means, dim=1).T
    else:
        expected = -torch.cdist(features, means)
    given = clusters(seed)[0]
    with torch.no_grad():
        found = head(given)[:, :-1]
    assert torch.equal(found.argmax(1), expected.argmax(1))


def test_the_scale_of_a_start_fits_how_wide_classes_are():
    losses = []
    for spread in (0.3, 3.0):
        draw = torch.Generator().manual_seed(1)
        means = torch.randn(CLASSES, WIDTH, generator=draw)
        labels = torch.arange(CLASSES).repeat(200)
        noise = torch.randn(2, len(labels), WIDTH, generator=draw)
        head = HEADS["linear"].build(section()(), WIDTH, CLASSES)
        start_from_means(head, means[labels] + spread * noise[0], labels)
        with torch.no_grad():
            logits = head(means[labels] + spread * noise[1])
            given = F.cross_entropy(logits, labels)
            best = min(F.cross_entropy(s * logits, labels) for s in torch.logspace(-2, 2, 81))
        losses.append(float(given - best))
    assert max(losses) < 0.02  # as likely as the best scale on images that were not seen


def test_a_run_starts_from_the_means_of_all_its_classes(small_pack, tmp_path):
    settings = ["model.head=cosine", "model.head_weights=means"]
    with prepared(small_pack, tmp_path / "run", "plain", *settings) as trainer:
        start_stage(trainer)
        values = features_of(
            trainer.model, trainer.pack, trainer.config, trainer.device, tmp_path / "run"
        )
        labels = torch.from_numpy(trainer.pack.train.label.astype("int64"))
        for label in range(trainer.space.num_classes):
            mean = F.normalize(values[labels == label], dim=1).mean(0)
            row = trainer.model.head.weight[label].detach()
            torch.testing.assert_close(row, F.normalize(mean, dim=0))


SPACE = ClassSpace(
    target_names=["grey_wolf", "n01"],
    auxiliary_names=["fox"],
    train_counts=[1, 1, 1],
    val_counts=[1, 1],
    display_names={"n01": "husky"},
    descriptions={"n01": "a dog with blue eyes"},
)


def test_texts_have_display_names_and_descriptions_where_a_class_has_them():
    templates = ("a {}.", "{}: {description}")
    assert texts_of(SPACE, 0, templates) == ["a grey wolf."]
    assert texts_of(SPACE, 1, templates) == ["a husky.", "husky: a dog with blue eyes"]
    with pytest.raises(UserError, match="'fox' has no description"):
        texts_of(SPACE, 2, ("{description}",))


def test_open_clip_is_named_where_it_is_missing_or_asked_for_what_it_lacks(monkeypatch):
    if find_spec("open_clip") is not None:
        with pytest.raises(UserError, match=r"write open-clip:MODEL/WEIGHTS, such as"):
            class_vectors("open-clip:no-such-model/openai", SPACE, ("{}",))
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(MissingExtra, match=r"fastlt\[open-clip\]"):
        class_vectors("open-clip:ViT-B-32/openai", SPACE, ("{}",))


@pytest.mark.slow
def test_vectors_are_those_of_open_clip(tmp_path):
    torchvision_shim.make_importable()
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.create_model("ViT-S-32-alt").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    place = f"open-clip:ViT-S-32-alt/{tmp_path / 'weights.pt'}"
    templates = ("a {}.", "many {}.")
    found = class_vectors(place, SPACE, templates)
    tokens = open_clip.get_tokenizer("ViT-S-32-alt")(["a husky.", "many husky."])
    with torch.no_grad():
        expected = F.normalize(model.encode_text(tokens, normalize=True).mean(0), dim=0)
    torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-5)
    assert found.shape[0] == 3
