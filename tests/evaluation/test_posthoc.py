"""Post-hoc scoring against plain formulas, and strengths that are chosen on other images than those
scored.
"""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from rich.console import Console

from fastlt.__main__ import main
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_post_hoc, evaluate_run
from fastlt.evaluation.metrics import class_accuracies
from fastlt.evaluation.posthoc import (
    BLOCK,
    METHODS,
    Features,
    apply,
    check_methods,
    choose,
    look,
    set_aside,
)
from fastlt.models.classifier import Classifier
from fastlt.models.heads import CosineHead, LinearHead
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.loop import train

LOG_PRIOR = torch.log(torch.tensor([0.6, 0.25, 0.1, 0.05]))


def model(cosine=False):
    torch.manual_seed(0)
    head = CosineHead(7, 4, 20.0) if cosine else LinearHead(7, 4)
    if not cosine:
        torch.nn.init.normal_(head.bias)
    return Classifier(torch.nn.Identity(), head)


def found(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 7, generator=generator)
    label = torch.randint(4, (count,), generator=generator).numpy()
    return Features(np.arange(count), label, values)


PLAIN = {  # feature, row of the weight, its bias, its log prior, strength -> logit
    "tau-norm": lambda x, w, b, p, s: float(x @ w) / float(w.norm()) ** s,
    "logit-adjustment": lambda x, w, b, p, s: float(x @ w) + b - s * p,
    "cosine": lambda x, w, b, p, s: s * float(x @ w) / float(x.norm() * w.norm()),
    "angular": lambda x, w, b, p, s: -s * math.acos(float(x @ w) / float(x.norm() * w.norm())),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("strength", [0.0, 0.7, 1.9])
def test_each_method_is_its_formula(name, strength):
    net, features = model().requires_grad_(False), found(11).values
    got = METHODS[name].logits(look(net, features, LOG_PRIOR), strength)
    rows = zip(net.head.weight, net.head.bias.tolist(), LOG_PRIOR.tolist(), strict=True)
    expected = torch.tensor(
        [[PLAIN[name](x, w, b, p, strength) for x in features] for w, b, p in rows]
    ).T
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_as_trained_is_what_the_model_says():
    net, some = model(), found(BLOCK + 17)
    predictions = apply(None, 0.0, net, some, LOG_PRIOR)
    probabilities = net(some.values).softmax(dim=1)
    assert (predictions.predicted == probabilities.argmax(dim=1).numpy()).all()
    np.testing.assert_allclose(
        predictions.confidence, probabilities.max(dim=1).values.detach(), rtol=1e-5
    )
    assert (predictions.image == some.image).all() and (predictions.label == some.label).all()


@pytest.mark.parametrize("name", ["tau-norm", "logit-adjustment"])
def test_the_strength_is_the_one_of_the_best_balanced_accuracy(name):
    net, some = model(), found(BLOCK + 301)
    accuracy = [
        class_accuracies(apply(METHODS[name], strength, net, some, LOG_PRIOR), 4).mean()
        for strength in METHODS[name].strengths.tolist()
    ]
    assert choose(METHODS[name], net, some, LOG_PRIOR) == pytest.approx(
        METHODS[name].strengths[int(np.argmax(accuracy))]
    )
    assert len(set(accuracy)) > 3


@pytest.mark.parametrize("name", ["cosine", "angular"])
def test_of_what_changes_confidence_alone_the_likeliest_is_taken(name):
    net, some = model(), found(200)
    some = some._replace(
        label=apply(METHODS[name], 1.0, net, some, LOG_PRIOR).predicted.astype(np.int64)
    )
    some.label[::5] = (some.label[::5] + 1) % 4  # a fifth is wrong at any strength
    label = torch.from_numpy(some.label)
    loss = [
        torch.nn.functional.cross_entropy(
            METHODS[name].logits(look(net, some.values, LOG_PRIOR), strength), label
        ).item()
        for strength in METHODS[name].strengths.tolist()
    ]
    assert choose(METHODS[name], net, some, LOG_PRIOR) == pytest.approx(
        METHODS[name].strengths[int(np.argmin(loss))]
    )
    assert 0 < np.argmin(loss) < len(loss) - 1


def test_cosine_and_angle_agree_on_the_winner():
    net, some = model(), found(500)
    assert (
        apply(METHODS["cosine"], 9, net, some, LOG_PRIOR).predicted
        == apply(METHODS["angular"], 2, net, some, LOG_PRIOR).predicted
    ).all()


def test_a_prior_in_the_logits_is_taken_out_again():
    """Logits that are off by the log prior: the adjustment of strength 1 is the right one."""
    head = LinearHead(4, 4)
    with torch.no_grad():
        head.weight.copy_(torch.eye(4))
        head.bias.copy_(LOG_PRIOR)
    label = np.random.default_rng(0).integers(0, 4, 4000)
    values = (
        torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) + 1.5 * torch.eye(4)[label]
    )
    strength = choose(
        METHODS["logit-adjustment"],
        Classifier(torch.nn.Identity(), head),
        Features(np.arange(4000), label, values),
        LOG_PRIOR,
    )
    assert 0.75 <= strength <= 1.25


def test_what_is_set_aside_is_of_every_class_and_leaves_some_of_each():
    rng = np.random.default_rng(3)
    labels = rng.permutation(np.repeat(np.arange(6), [1, 2, 3, 10, 50, 101]))
    for share in (0.01, 0.2, 0.9):
        aside = set_aside(labels, share)
        for label, count in enumerate([1, 2, 3, 10, 50, 101]):
            expected = min(count - 1, max(1, round(share * count)))
            assert aside[labels == label].sum() == expected
    # not one end of the class
    assert set_aside(np.zeros(40, int), 0.5)[:20].sum() == pytest.approx(10, abs=1)


def test_methods_without_effect_or_name_are_refused():
    with pytest.raises(
        UserError, match=r"there is no post-hoc method 'tau'.*did you mean 'tau-norm'"
    ):
        check_methods(["tau"], model())
    with pytest.raises(UserError, match="changes nothing about a cosine head"):
        check_methods(["tau-norm"], model(cosine=True))
    check_methods(["logit-adjustment", "cosine", "angular"], model(cosine=True))


def test_all_are_those_that_make_a_difference(run, small_pack, tmp_path):
    assert list(evaluate_post_hoc(run, ["all"], None, None, 0.34, None)) == ["as trained", *METHODS]
    settings = [
        "model.name=resnet8",
        "model.head=cosine",
        "data.size=16",
        "data.batch=16",
        "data.workers=0",
        "train.epochs=1",
        "train.threads=1",
        "loss.name=ce",
        f"data.pack={json.dumps(str(small_pack))}",
    ]
    train(load_config("cifar100-siblings", settings), tmp_path / "run", Console(quiet=True))
    assert list(evaluate_post_hoc(tmp_path / "run", ["all"], None, None, 0.34, None)) == [
        "as trained",
        "logit-adjustment",
        "cosine",
        "angular",
    ]


def test_options_that_would_do_nothing_are_refused_and_figures_are_written(
    run, tmp_path, capsys, monkeypatch
):
    def evaluated(*options):
        monkeypatch.setattr(sys, "argv", ["fastlt", "eval", str(run), *options])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr()

    for options, said in (
        (["--share", "0.3"], "are for --post-hoc"),
        (
            ["--post-hoc", "cosine", "--share", "0.3", "--strength", "1"],
            "leave it out with --validation and --strength",
        ),
        (["--post-hoc", "all", "--strength", "1"], "is of one method"),
        (["--post-hoc", "tau-norm", "--strength", "inf"], "must be a finite number"),
    ):
        code, printed = evaluated(*options)
        assert code == 2 and said in printed.err
    code, printed = evaluated("--post-hoc", "tau-norm", "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert code == 0 and set(figures) == {"as trained", "tau-norm"} and "tau-norm" in printed.out


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("posthoc") / "run"
    settings = [
        "model.name=resnet8",
        "data.size=16",
        "data.padding=2",
        "data.batch=16",
        "data.workers=0",
        "train.epochs=4",
        "train.eval_every=4",
        "train.threads=1",
        "loss.name=ce",
        f"data.pack={json.dumps(str(small_pack))}",
    ]
    train(load_config("cifar100-siblings", settings), folder, Console(quiet=True))
    return folder


def test_images_that_chose_are_not_scored(run, small_pack):
    results = evaluate_post_hoc(run, list(METHODS), None, None, 0.34, None)
    assert list(results) == ["as trained", *METHODS]
    assert all((result["images"], result["chosen_on"]) == (6, 3) for result in results.values())
    assert all("strength" in results[name] for name in METHODS)


@pytest.fixture(scope="module")
def other_pack(image_folders, tmp_path_factory):
    """Of the same targets, validated on training images."""
    root = image_folders
    out = tmp_path_factory.mktemp("other") / "pack"
    for name in "abc":
        (out.parent / "val" / name).mkdir(parents=True)
        for i in range(3 if name != "b" else 6):
            shutil.copy(root / "target" / name / f"{i}.png", out.parent / "val" / name)
    collection = read_collection(
        root / "target", root / "auxiliary", out.parent / "val", root / "pairs.csv"
    )
    return write_pack(collection, PackOptions(out=out, workers=1), Console(quiet=True))


def test_nothing_is_chosen_on_what_is_scored(run, small_pack, other_pack, image_folders, tmp_path):
    with pytest.raises(
        UserError, match=r"9 of the 9 validation images of .* are those that are scored"
    ):
        evaluate_post_hoc(run, ["tau-norm"], None, small_pack, 0.2, None)
    with pytest.raises(UserError, match="are those that are scored"):
        evaluate_post_hoc(run, ["tau-norm"], other_pack, other_pack, 0.2, None)
    shutil.copytree(image_folders / "val", tmp_path / "val")
    shutil.copy(image_folders / "target/a/0.png", tmp_path / "val/a/0.png")  # one less
    collection = read_collection(image_folders / "target", None, tmp_path / "val")
    mostly = write_pack(
        collection, PackOptions(out=tmp_path / "pack", workers=1), Console(quiet=True)
    )
    with pytest.raises(UserError, match=r"8 of the 9 validation images"):
        evaluate_post_hoc(run, ["tau-norm"], None, mostly, 0.2, None)


def test_another_pack_chooses_or_nobody_does(run, other_pack):
    results = evaluate_post_hoc(run, ["tau-norm"], None, other_pack, 0.2, None)
    assert results["tau-norm"]["images"] == 9 and results["tau-norm"]["chosen_on"] == 12
    fixed = evaluate_post_hoc(run, ["logit-adjustment"], None, None, 0.2, 0.0)
    assert fixed["logit-adjustment"] | {"strength": 0} == fixed["as trained"] | {"strength": 0}
    assert (
        fixed["as trained"]["top1"] == evaluate_run(run)["top1"]
        and fixed["as trained"]["chosen_on"] == 0
    )
