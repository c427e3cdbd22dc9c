"""Training by weights of classes and images: the loss, and runs that go on to the same bits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.command import fastlt
from helpers.method_cases import QUIET, SMALL, batch_of, config_of, prepared, trained
from safetensors.torch import load_file
from torch.nn import functional as F

from fastlt.errors import ConfigError, UserError
from fastlt.losses import IGNORED
from fastlt.methods import method_names
from fastlt.packing.reader import open_pack
from fastlt.training.compile import build_forward
from fastlt.training.distributed import ALONE
from fastlt.training.loop import set_modes, train, train_step

PLAIN = ["loss.name=ce", "data.auxiliary=false", "train.epochs=1"]
BY_CLASS = "data.class_weights={a = 0.25, c = 3.0}"
# what a method needs besides, on a data set of 21 images of three targets
OWN: dict[str, list[str]] = {
    "attentive": ["method.epochs=2", "method.size=4", "method.loss=margin"],
    "lcreg": ["method.latents=6"],
    "fate": ["method.graph_epochs=2", "method.shots=3", "method.folds=2"],
    "distill": ["method.teacher={teacher}"],
}


@pytest.fixture(scope="module")
def teacher(small_pack, tmp_path_factory):
    return trained(small_pack, tmp_path_factory.mktemp("teacher") / "run", "plain")


def sample_file(folder: Path, **weights: float) -> str:
    file = folder / "weights.csv"
    rows = "".join(f"{name.replace('_', '/')}.png,{value}\n" for name, value in weights.items())
    file.write_text("image,weight\n" + rows)
    return f"data.sample_weights={file}"


def steps_of(pack: Path, run: Path, *settings: str, method: str = "plain"):
    """Yield each batch of an epoch with its loss, and what the forward pass was given."""
    with prepared(pack, run, method, *PLAIN, *settings) as trainer:
        set_modes(trainer)
        seen = []

        def forward(images, *labels):
            with torch.no_grad():
                seen.append((trainer.model(images), *labels))
            return trainer.method(images, *labels)

        for batch, pixels in trainer.train_loader.iterate(trainer.plan.epoch(0)):
            loss = train_step(trainer, forward, batch, pixels)[0]
            trainer.state.step_in_epoch += 1
            yield batch, loss, seen[-1]


def test_class_weights_are_torchs(small_pack, tmp_path):
    weights = torch.tensor([0.25, 1.0, 3.0])
    for _, loss, (logits, target, *_) in steps_of(small_pack, tmp_path, BY_CLASS):
        wanted = F.cross_entropy(logits, target, weight=weights)
        torch.testing.assert_close(loss, wanted)
        assert not torch.isclose(loss, F.cross_entropy(logits, target), rtol=1e-3)


def test_an_image_of_weight_zero_is_not_in_the_loss(small_pack, tmp_path):
    keys = [open_pack(small_pack).train.key(image) for image in range(21)]
    left_out = {"a/0.png", "a/5.png", "b/2.png", "c/1.png"}
    setting = sample_file(tmp_path, a_0=0, a_5=0, b_2=0, c_1=0)
    found = 0
    for batch, loss, (logits, target, *_) in steps_of(small_pack, tmp_path / "run", setting):
        zero = torch.tensor([keys[image] in left_out for image in batch.images])
        found += int(zero.sum())
        wanted = F.cross_entropy(logits, target.masked_fill(zero, IGNORED))
        torch.testing.assert_close(loss, wanted)
    assert found == len(left_out)


def test_classes_and_images_multiply(small_pack, tmp_path):
    keys = [open_pack(small_pack).train.key(image) for image in range(35)]
    settings = [BY_CLASS, sample_file(tmp_path, a_0=8, b_1=0.5)]
    of_class = torch.tensor([0.25, 1.0, 3.0])
    for batch, loss, (logits, target, *_) in steps_of(small_pack, tmp_path / "run", *settings):
        own = [{"a/0.png": 8.0, "b/1.png": 0.5}.get(keys[image], 1.0) for image in batch.images]
        weights = of_class[target] * torch.tensor(own)
        each = F.cross_entropy(logits, target, reduction="none")
        torch.testing.assert_close(loss, (weights * each).sum() / weights.sum())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_weigh_what_both_do(small_pack, tmp_path, kind):
    of_class = torch.tensor([0.25, 1.0, 3.0])
    settings = [BY_CLASS, f"augment.{kind}=1.0"]
    for _, loss, (logits, target, other, mix) in steps_of(small_pack, tmp_path, *settings):
        both = [F.cross_entropy(logits, t, reduction="none") for t in (target, other)]
        each = mix * both[0] + (1 - mix) * both[1]
        weights = mix * of_class[target] + (1 - mix) * of_class[other]
        torch.testing.assert_close(loss, (weights * each).sum() / weights.sum())


def test_merged_auxiliaries_weigh_what_their_targets_do(small_pack, tmp_path):
    settings = ["data.auxiliary=merged", BY_CLASS]
    of_class = torch.tensor([0.25, 1.0, 3.0])
    for _, loss, (logits, target, *_) in steps_of(small_pack, tmp_path, *settings):
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, weight=of_class))


def test_equal_weights_train_as_none_do(small_pack, tmp_path):
    equal = "data.class_weights={a = 2.0, b = 2.0, c = 2.0, x = 2.0, y = 2.0}"
    settings = ["augment.mixup=0.5", "optim.accumulate=2", "data.batch=8"]
    runs = [
        trained(small_pack, tmp_path / str(number), "plain", *settings, *added)
        for number, added in enumerate([[], [equal]])
    ]
    one, two = (load_file(run / "model.safetensors") for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)


def test_accumulating_is_training_on_the_larger_batch(small_pack, tmp_path):
    """Two halves have the weights of the whole: see the test of the same name in test_loop."""
    constant = ["schedule.name=step", "schedule.steps={9=0.1}", "schedule.head_only_epochs=2"]
    constant += ["loss.name=ce", "data.drop_last=true", "data.budget=49"]
    constant += ["data.class_weights={a = 0.25, x = 3.0}", sample_file(tmp_path, y_1=9)]
    parts = {"whole": [], "halves": ["data.batch=8", "optim.accumulate=2"]}
    runs = [trained(small_pack, tmp_path / n, "plain", *constant, *s) for n, s in parts.items()]
    whole, halves = (load_file(run / "model.safetensors") for run in runs)
    torch.testing.assert_close(halves["head.weight"], whole["head.weight"], rtol=1e-4, atol=1e-5)


# --- methods


def rows_alike(method: str, pack: Path, run: Path, teacher: Path, weight: float | None):
    """Return the loss of a step of a method in which all rows weigh the same."""
    own = [setting.format(teacher=teacher) for setting in OWN.get(method, [])]
    with prepared(pack, run, method, *own) as trainer:
        set_modes(trainer)
        trainer.method.begin(0)
        images, target = batch_of(trainer)
        trainer.method.row_weight = None if weight is None else torch.full((8,), weight)
        torch.manual_seed(3)
        return trainer.method(images, target).loss


@pytest.mark.parametrize("method", [name for name in method_names() if name != "dlsa"])
def test_all_terms_of_a_method_go_by_the_weights(small_pack, tmp_path, teacher, method):
    """But those of lcreg that know no labels."""
    given = (method, small_pack, tmp_path, teacher)
    plain, ones, zeros = (rows_alike(*given, weight) for weight in (None, 1.0, 0.0))
    torch.testing.assert_close(ones, plain)
    assert (zeros > 0) == (method == "lcreg")


def test_the_teachers_maps_go_by_the_weights(small_pack, tmp_path, teacher):
    with prepared(small_pack, tmp_path, "propheter", f"method.teacher={teacher}") as trainer:
        maps = torch.randn(2, 8, 4, 3, 3, generator=torch.Generator().manual_seed(0))
        plain = trainer.method.apart(*maps)
        weights = torch.rand(8, generator=torch.Generator().manual_seed(1))
        trainer.method.row_weight = torch.ones(8)
        torch.testing.assert_close(trainer.method.apart(*maps), plain)
        trainer.method.row_weight = weights
        wanted = (weights[:, None, None, None] * (maps[0] - maps[1]) ** 2).mean()
        torch.testing.assert_close(trainer.method.apart(*maps), wanted)


def test_a_method_with_weights_of_its_own_is_refused(small_pack, tmp_path):
    with pytest.raises(UserError, match=r"method\.name=dlsa has weights of its own"):
        trained(small_pack, tmp_path / "run", "dlsa", BY_CLASS)


# --- runs


def test_a_run_that_was_cut_goes_on_to_the_same_bits(small_pack, tmp_path):
    settings = [BY_CLASS, sample_file(tmp_path, a_0=0, y_3=2.5), "augment.mixup=0.8"]
    settings += ["data.batch=8", "optim.accumulate=2", "train.checkpoint_steps=2", "train.keep=99"]
    whole = trained(small_pack, tmp_path / "whole", "plain", *settings)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    saved = sorted((cut / "checkpoints").iterdir())
    for path in saved[len(saved) // 2 + 1 :]:
        shutil.rmtree(path)
    trained(small_pack, cut, "plain", *settings)
    one, two = (load_file(run / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole / "metrics.jsonl").read_text().count("\n") == 2


def test_other_weights_in_the_same_file_are_refused(small_pack, tmp_path):
    setting = sample_file(tmp_path, a_0=2)
    config = config_of(small_pack, "plain", setting)
    train(config, tmp_path / "run", QUIET)
    sample_file(tmp_path, a_0=3)
    with pytest.raises(
        UserError, match=r"the weights of data\.class_weights or data.sample_weights"
    ):
        train(config, tmp_path / "run", QUIET)
    sample_file(tmp_path, a_0=2)
    train(config, tmp_path / "run", QUIET)


def test_unknown_names_are_one_sentence_and_code_2(small_pack, tmp_path):
    command = ["train", "cifar100-siblings", "--data", small_pack]
    command += ["--out", tmp_path / "run", *SMALL]
    for setting, said in (
        (
            "data.class_weights={aa = 2.0}",
            "names the class 'aa', which is not in the pack, did you mean 'a'?",
        ),
        (
            sample_file(tmp_path, q_1=2, r_1=2),
            "names 2 images, 'q/1.png' first, which are not among the training images",
        ),
    ):
        ended = fastlt(*command, setting)
        assert ended.returncode == 2
        assert said in ended.stderr and "Traceback" not in ended.stderr
        assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "'two'"])
def test_class_weights_are_above_zero(small_pack, weight):
    with pytest.raises(ConfigError, match=r"data\.class_weights"):
        config_of(small_pack, "plain", f"data.class_weights={{a = {weight}}}")


def test_a_csv_of_class_weights_is_kept_as_its_path(small_pack, tmp_path):
    (tmp_path / "classes.csv").write_text("class,weight\na,0.25\nc,3\n")
    by_file = f"data.class_weights={tmp_path / 'classes.csv'}"
    runs = [
        trained(small_pack, tmp_path / name, "plain", setting)
        for name, setting in (("file", by_file), ("names", BY_CLASS))
    ]
    one, two = (load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert json.dumps(str(tmp_path / "classes.csv")) in (runs[0] / "config.toml").read_text()


@pytest.mark.slow
def test_a_compiled_step_sees_the_weights_of_each_batch(small_pack, tmp_path):
    with prepared(small_pack, tmp_path, "plain") as trainer:
        set_modes(trainer)
        images, target = batch_of(trainer)
        compiled = build_forward(trainer.method, ALONE, "default", len(images))
        for seed in range(3):
            trainer.method.row_weight = torch.rand(8, generator=torch.Generator().manual_seed(seed))
            wanted = trainer.method(images, target, None, None).loss
            torch.testing.assert_close(compiled(images, target, None, None).loss, wanted)
