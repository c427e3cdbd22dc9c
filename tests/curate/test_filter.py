"""From a pack to auxiliary images that pack and train: planted leaks, duplicates and strangers are
found, and named.
"""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from helpers.command import fastlt
from PIL import Image, ImageOps
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("aiohttp", reason="no aiohttp here: it comes with the extra `curate`")
from fastlt.curate.filter import run_filter
from fastlt.curate.retrieve import run_retrieve
from fastlt.curate.settings import CurateConfig
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(hued_pack, tmp_path_factory):
    """A backbone of our own that tells hues apart: there are no pretrained weights here."""
    out = tmp_path_factory.mktemp("run") / "run"
    command = [
        "train",
        "cifar100-siblings",
        "--data",
        str(hued_pack),
        "--out",
        str(out),
        "model.name=resnet8",
        "data.size=32",
        "data.batch=16",
        "data.auxiliary=false",
        "loss.name=ce",
        "train.epochs=8",
        "train.eval_every=8",
        "data.crop=random-resized-crop",
        "data.scale=[0.6, 1.0]",
        "train.threads=1",
        "data.engine=torch",
        "data.workers=0",
    ]
    ended = fastlt(*command)
    assert ended.returncode == 0, ended.stderr
    return out


@pytest.fixture
def curated(tmp_path, photos):
    """What `propose` would write: two categories, and a folder with images of them."""
    rows = [
        {
            "name": name,
            "query": name,
            "key": "n00000001",
            "description": "",
            "provider": "wordnet",
            "owners": owners,
        }
        for name, owners in (("mink", ["otter"]), ("bench", ["sofa", "otter"]))
    ]
    out = tmp_path / "curated"
    out.mkdir()
    (out / "categories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    photos.write(tmp_path / "images", "mink", range(20))
    photos.write(tmp_path / "images", "bench", range(12))
    return out


def settings_of(curated, run, **changes):
    folder = {"sources": ["folder"], "folder": str(curated.parent / "images")}
    chosen = {
        "weights": str(run),
        "workers": 0,
        "min_images": 5,
        "gamma1": 0.7,
        "gamma2": 1.1,
        **changes,
    }
    return CurateConfig.model_validate({"retrieve": folder, "filter": chosen})


def filtered(curated, pack, config, console=QUIET):
    """A row for each image, by its name."""
    run_retrieve(curated, config, QUIET)
    run_filter(str(pack), curated, config, console)
    rows = [json.loads(line) for line in (curated / "filtered.jsonl").read_text().splitlines()]
    return {row["place"].rsplit("/", 1)[-1].removesuffix(".jpg"): row for row in rows}


def plant(curated, name, image: bytes):
    (curated.parent / "images/mink" / f"{name}.jpg").write_bytes(image)


def test_leaks_duplicates_and_strangers_are_dropped_and_nothing_else(
    curated, hued_pack, run, tmp_path, photos
):
    first = photos.image("mink", 3)
    half = first.resize((64,) * 2, Image.Resampling.LANCZOS)
    planted = {
        "z1": (photos.encoded(first), "duplicate: the same bytes"),
        "z2": (photos.encoded(half, 70), "duplicate: the same look"),
        "z3": (photos.encoded(ImageOps.mirror(first), 80), "duplicate: the same look"),
        "z4": (photos.encoded(photos.image("otter", 5)), "leak: the bytes of a training image"),
        "z5": (photos.encoded(photos.image("sofa", 102)), "leak: the bytes of a validation image"),
        "z6": (
            photos.encoded(ImageOps.mirror(photos.image("otter", 103)), 60),
            "leak: the look of a validation image",
        ),
        "z7": (
            photos.encoded(photos.image("otter", 7).resize((80, 80), Image.Resampling.LANCZOS), 60),
            "leak: the look of a training image",
        ),
        "z8": (photos.encoded(photos.image("sofa", 500)), "unlike its class"),
        "z9": (photos.encoded(photos.image("otter", 501)), "unlike its class"),
    }
    for name, (image, _) in planted.items():
        plant(curated, name, image)
    console = Console(record=True, width=160)
    rows = filtered(curated, hued_pack, settings_of(curated, run), console)
    assert {name: rows[name]["reason"] for name in planted} == {
        name: reason for name, (_, reason) in planted.items()
    }
    assert [name for name, row in rows.items() if not row["kept"]] == list(planted)
    assert rows["z1"]["of"].startswith(str(curated / "raw")) and "/val/" in rows["z5"]["of"]
    assert (
        min(row["likeness"] for row in rows.values() if row["kept"]) > 0.7 > rows["z8"]["likeness"]
    )
    said = console.export_text()
    assert (
        "32" in said
        and "kept" in said
        and "2 of 2 classes are left" in said
        and "now: fastlt pack --target" in said
    )


def test_what_is_kept_is_an_auxiliary_set_with_its_summary(
    curated, hued_pack, run, tmp_path, photos
):
    plant(curated, "z8", photos.encoded(photos.image("sofa", 500)))
    config = settings_of(curated, run)
    filtered(curated, hued_pack, config)
    with (curated / "pairs.csv").open() as file:
        header, *pairs = csv.reader(file)
    assert header == ["target", "auxiliary"] and sorted(pairs) == [
        ["otter", "bench"],
        ["otter", "mink"],
        ["sofa", "bench"],
    ]
    collection = read_collection(hued_pack, curated / "auxiliary", hued_pack, curated / "pairs.csv")
    assert collection.target_names == ["otter", "sofa", "tulip"] and collection.auxiliary_names == [
        "bench",
        "mink",
    ]
    made = write_pack(collection, PackOptions(out=tmp_path / "whole", workers=1), QUIET)
    space = open_pack(made).space
    assert space.train_counts == [40, 20, 10, 12, 20] and space.val_counts == [6, 6, 6]
    assert space.curation["images"] == 32 and space.curation["dropped"] == {"unlike its class": 1}
    assert space.curation["licences"] == {"unknown": 32} and space.curation["owners"] == 2
    assert space.origins == {"mink": "wordnet n00000001", "bench": "wordnet n00000001"}
    assert space.pairs == [(0, 3), (0, 4), (1, 3)]
    again = open_pack(made)
    assert bytes(again.train.read(0)) == bytes(open_pack(hued_pack).train.read(0))
    filtered(curated, hued_pack, config)  # in the place of the first
    assert (curated / "sheet.html").is_file() and len(list((curated / "sheets").iterdir())) == 2
    page = (curated / "sheets/0000.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 21 and "unlike its class" in page


def test_images_of_a_test_pack_are_leaks(curated, hued_pack, run, tmp_path, photos):
    photos.write(tmp_path / "more", "otter", [900, 901])
    test = write_pack(
        read_collection(tmp_path / "more", None, tmp_path / "more"),
        PackOptions(out=tmp_path / "test", workers=1),
        QUIET,
    )
    plant(curated, "z1", photos.encoded(photos.image("otter", 901)))
    rows = filtered(curated, hued_pack, settings_of(curated, run, test=str(test)))
    assert rows["z1"]["reason"] == "leak: the bytes of a test image"


def test_prototypes_of_the_owners_images(curated, hued_pack, run):
    """A sofa-coloured class looks like its owner, a mink does not."""
    rows = filtered(
        curated, hued_pack, settings_of(curated, run, prototype="targets", min_images=1, gamma1=0.0)
    )
    by_class = {
        name: [row["likeness"] for row in rows.values() if row["category"] == name]
        for name in ("mink", "bench")
    }
    own = filtered(curated, hued_pack, settings_of(curated, run, min_images=1, gamma1=0.0))
    assert np.mean(by_class["mink"]) < np.mean(
        [row["likeness"] for row in own.values() if row["category"] == "mink"]
    )


def test_small_classes_are_given_up(curated, hued_pack, run):
    rows = filtered(curated, hued_pack, settings_of(curated, run, min_images=15))
    assert {row["reason"] for row in rows.values() if row["category"] == "bench"} == {
        "too few images of its class are left"
    }
    with pytest.raises(UserError, match="no image is left"):
        filtered(curated, hued_pack, settings_of(curated, run, min_images=100))
    # they are not what filtered.jsonl says
    assert not (curated / "auxiliary").exists() and not (curated / "pairs.csv").exists()


def test_what_was_computed_is_not_computed_again(curated, hued_pack, run, monkeypatch):
    config = settings_of(curated, run)
    before = filtered(curated, hued_pack, config)
    monkeypatch.setattr("fastlt.curate.image_index.extract", None)
    monkeypatch.setattr("fastlt.curate.image_index.hashes_of", None)
    assert filtered(curated, hued_pack, config) == before
    for path in (curated / "features").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    monkeypatch.undo()
    assert filtered(curated, hued_pack, config) == before


def test_features_are_of_the_weights_and_not_of_their_place(curated, hued_pack, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    before = filtered(curated, hued_pack, settings_of(curated, copy))
    made = len(list((curated / "features").glob("features-*")))
    # the same weights elsewhere
    assert filtered(curated, hued_pack, settings_of(curated, run)) == before
    assert len(list((curated / "features").glob("features-*"))) == made
    tensors = load_file(copy / "model.safetensors")
    with safe_open(copy / "model.safetensors", "pt") as file:
        told = file.metadata()
    save_file(
        {
            name: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t
            for name, t in tensors.items()
        },
        copy / "model.safetensors",
        told,
    )
    filtered(curated, hued_pack, settings_of(curated, copy))
    assert len(list((curated / "features").glob("features-*"))) == 2 * made


def test_what_has_no_accepted_licence_is_dropped_and_counted(curated, hued_pack, run, tmp_path):
    (curated.parent / "images/mink/broken.jpg").write_bytes(b"no image")
    filtered(curated, hued_pack, settings_of(curated, run))
    card = json.loads((curated / "auxiliary/card.json").read_text())
    assert card["kind"] == "neighbours" and card["not_retrieved"] == {
        "not an image (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF or PPM)": 1
    }
    config = settings_of(curated, run)
    config = config.model_copy(
        update={"retrieve": config.retrieve.model_copy(update={"licences": ("cc0",)})}
    )
    with pytest.raises(UserError, match="no image is left"):
        run_filter(str(hued_pack), curated, config, QUIET)
    reasons = {
        json.loads(line)["reason"] for line in (curated / "filtered.jsonl").read_text().splitlines()
    }
    assert reasons == {"its licence is not accepted"}


def test_owners_must_be_targets_of_the_pack(curated, hued_pack, run):
    (curated / "categories.jsonl").write_text(
        json.dumps({"name": "mink", "query": "mink", "owners": ["stranger"]}) + "\n"
    )
    with pytest.raises(
        UserError, match="'mink' was proposed for 'stranger', which is no target of"
    ):
        filtered(curated, hued_pack, settings_of(curated, run))
    shutil.rmtree(curated / "raw")
    with pytest.raises(UserError, match="fetch some with `fastlt curate retrieve`"):
        run_filter(str(hued_pack), curated, settings_of(curated, run), QUIET)


def test_all_of_it_then_pack_then_train(hued_pack, run, tmp_path, photos):
    """The whole way by commands: a file of neighbours, a folder of images, a pack, a training."""
    photos.write(tmp_path / "images", "mink", range(14))
    photos.write(tmp_path / "images", "bench", range(14))
    (tmp_path / "mine.csv").write_text("target,category\notter,mink\nsofa,bench\nsofa,otters\n")

    def said_by(*arguments):
        ended = fastlt(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    out = tmp_path / "curated"
    said = said_by(
        "curate",
        "all",
        hued_pack,
        "--out",
        out,
        "propose.provider=file",
        f"propose.file={tmp_path}/mine.csv",
        "retrieve.sources=['folder']",
        f"retrieve.folder={tmp_path}/images",
        f"filter.weights={run}",
        "filter.workers=0",
        "filter.gamma2=1.1",
    )
    assert (
        "2 auxiliary classes" in said
        and "28 images of 2 categories" in said
        and "2 of 2 classes are left" in said
    )
    said_by(
        "pack",
        "--target",
        hued_pack,
        "--auxiliary",
        out / "auxiliary",
        "--pairs",
        out / "pairs.csv",
        "--out",
        tmp_path / "whole",
    )
    said_by(
        "train",
        "cifar100-siblings",
        "--data",
        tmp_path / "whole",
        "--out",
        tmp_path / "run",
        "model.name=resnet8",
        "data.size=32",
        "train.epochs=1",
        "data.batch=16",
        "train.threads=1",
        "data.engine=torch",
        "data.workers=0",
    )
    page = (tmp_path / "run/report.html").read_text()
    assert (
        "28 images of 2 classes, for 2 targets" in page
        and "folder 28" in page
        and "How the auxiliary set was curated" in page
    )
    assert json.loads((tmp_path / "run/result.json").read_text())["epochs"] == 1
    said_by("curate", "filter", hued_pack, "--out", out)  # by what config.toml kept
