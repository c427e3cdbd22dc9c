"""The study of fine-tuning: which trainings it makes, and what it reads of them."""

import csv

import pytest
from helpers.method_cases import QUIET
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.studies.auxiliary_kinds import KINDS, NONE, as_many_images, chosen
from fastlt.studies.finetune import TASKS, accuracies, by_group, controls_of, finetune
from fastlt.studies.pretraining import SMALL_VIT
from fastlt.studies.protocol import ReproduceOptions
from fastlt.studies.repeated import folder_name
from fastlt.studies.reproduce import run_reproduce

SMALL = ["model.name=resnet8", "model.pretrained=false", "data.size=16", "data.workers=0"]


def options(source, out, *settings, **more):
    return ReproduceOptions(source, out, 1, 1, 1, [*SMALL, *settings], **more)


@pytest.fixture(scope="module")
def grocery(shared_data):
    if not (shared_data / "grocery" / "task.csv").is_file():
        pytest.skip("the grocery photographs are not here")
    return f"grocery:{shared_data / 'grocery'}"


@pytest.mark.parametrize("kind", TASKS)
def test_every_row_and_column_is_a_training_that_fits_together(kind):
    task = TASKS[kind]
    for own in task.rows.values():
        for column in task.columns:
            config = load_config(task.recipe, [*task.settings, *own, *KINDS[column][1]])
            assert config.loss.name in ("balanced-ce", "neighbor-silencing")
    adapted = {load_config(task.recipe, own).model.adapt for own in task.rows.values()}
    assert len(adapted) == len(task.rows)


def test_names_are_chosen_by_patterns():
    names = ["head | a", "lora | a", "lora | b"]
    assert chosen(names, ()) == names
    assert chosen(names, ("lora | *",)) == names[1:]
    assert chosen(names, ("head*", "* | b")) == ["head | a", "lora | b"]
    with pytest.raises(UserError, match=r"matches none of: head \| a"):
        chosen(names, ("full | *",))


@pytest.mark.slow
def test_without_auxiliaries_as_many_images_are_seen(grocery, tmp_path):
    wanted = options(grocery, tmp_path)
    task = TASKS["grocery"]
    found = controls_of(task, wanted.settings, wanted._replace(epochs=15, only=("full | *",)))
    none, silenced = (
        load_config(task.recipe, found[f"full | {c}"].settings) for c in (NONE, "silenced 0.1")
    )
    pack = found["full | silenced 0.1"].pack
    space = open_pack(str(pack)).space
    targets = sum(space.train_counts[:23])
    seen = silenced.train.epochs * (targets + 25 * 27)
    assert abs(none.train.epochs * targets - seen) <= targets / 2
    assert as_many_images(15, pack, task.recipe, task.settings) == none.train.epochs
    assert silenced.train.eval_every == silenced.train.epochs == 15


@pytest.mark.slow
def test_rows_have_test_figures_and_what_was_trained(grocery, tmp_path):
    wanted = options(grocery, tmp_path / "study", only=("head | n*", "norm | silenced*"))
    run_reproduce("finetune", wanted, tmp_path / "rows.csv", QUIET)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert [(row["row"], row["column"]) for row in rows[-1:]] == [("norm", "silenced 0.1")]
    assert len([row for row in rows if row["row"] == "head"]) == 10  # five seeds of two columns
    for row in rows:
        assert 0 <= float(row["top1"]) <= 100 and row["val_top1"] != ""
        assert int(row["trained_parameters"]) < int(row["parameters"])
    scored = tmp_path / "study" / folder_name("head | neighbours", 0) / "test.json"
    stamp = scored.stat().st_mtime_ns
    again = finetune(wanted, QUIET)  # nothing is trained or scored again
    assert scored.stat().st_mtime_ns == stamp
    said = Console(record=True, width=140)
    said.print(accuracies(again))
    said.print(by_group(again))
    text = said.export_text()
    assert NONE in text and "norm" in text and "many / medium / few" in text


def test_other_sources_and_options_are_refused(tmp_path):
    with pytest.raises(UserError, match="finetune is for --data grocery:DIR or cifar100:DIR"):
        finetune(options("flowers:x", tmp_path), QUIET)
    with pytest.raises(UserError, match="--only picks rows of other studies than cifar100-lt"):
        run_reproduce("cifar100-lt", options("cifar100:x", tmp_path, only=("a",)), None, QUIET)


def test_the_small_vit_is_the_one_that_is_pretrained():
    one, other = load_config("pretrain-small-vit"), load_config("finetune-vit", SMALL_VIT)
    assert (one.model.name, one.model.args) == (other.model.name, other.model.args)
