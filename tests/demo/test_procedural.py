"""The demo's data: what is written is what was asked for, the same each time, and no easier than it
says.
"""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt.demo.procedural import (
    BETWEEN,
    FAMILIES,
    RING,
    Texture,
    choose_auxiliaries,
    choose_targets,
    render,
    write_demo_data,
)
from fastlt.errors import UserError
from fastlt.utils.long_tail import long_tail


def counts(folder: Path) -> dict[str, int]:
    return {path.name: len(list(path.glob("*.jpg"))) for path in folder.iterdir()}


def pairs_of(folder: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO((folder / "pairs.csv").read_text())))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("procedural") / "images"
    write_demo_data(out, head=100, images_per_auxiliary=2, val_per_class=3)
    return out


def test_class_counts_follow_the_long_tail(data: Path) -> None:
    expected = sorted((int(100 * 100 ** (-i / 19)) for i in range(20)), reverse=True)
    assert sorted(counts(data / "target").values(), reverse=True) == expected
    assert max(expected) / min(expected) == 100
    assert counts(data / "val") == dict.fromkeys(counts(data / "target"), 3)
    assert set(counts(data / "auxiliary").values()) == {2}


def test_the_defaults_reach_imbalance_100_exactly() -> None:
    tail = long_tail(200, 100, 20)
    assert (tail[0], tail[-1]) == (200, 2)
    assert long_tail(5, 100, 4, least=1) == [5, 1, 1, 1]


def test_at_least_forty_auxiliaries_all_with_an_owner_and_some_with_two(data: Path) -> None:
    header, *pairs = pairs_of(data)
    assert header == ["target", "auxiliary"]
    targets, auxiliaries = set(counts(data / "target")), set(counts(data / "auxiliary"))
    assert len(targets) == 20 and len(auxiliaries) == 40 and not targets & auxiliaries
    assert {target for target, _ in pairs} == targets
    assert {auxiliary for _, auxiliary in pairs} == auxiliaries
    owners = [sum(auxiliary == name for _, auxiliary in pairs) for name in auxiliaries]
    assert sorted(owners) == [1] * 20 + [2] * 20


def test_images_are_jpegs_of_the_asked_size_and_differ(tmp_path: Path) -> None:
    write_demo_data(
        tmp_path / "d", targets=3, head=4, images_per_auxiliary=1, val_per_class=2, size=80
    )
    files = sorted((tmp_path / "d").rglob("*.jpg"))
    assert len({file.read_bytes() for file in files}) == len(files)
    for file in files:
        with Image.open(file) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (80, 80), "RGB")


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path: Path) -> None:
    def written(name: str, seed: int) -> dict[str, bytes]:
        out = tmp_path / name
        write_demo_data(
            out, targets=5, head=4, images_per_auxiliary=1, val_per_class=1, size=32, seed=seed
        )
        return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*.*")}

    first = written("a", 3)
    assert written("b", 3) == first
    assert written("c", 4) != first


def test_every_run_of_five_targets_has_every_family() -> None:
    chosen = choose_targets(20, seed=1)
    for start in range(0, 20, 5):
        assert {texture.family for texture in chosen[start : start + 5]} == set(FAMILIES)
    assert [t.name for t in choose_targets(20, 1)] != [t.name for t in choose_targets(20, 2)]


def test_a_shared_auxiliary_lies_midway_between_its_owners() -> None:
    targets = choose_targets(20, seed=0)
    cells = {texture.name: texture for texture in targets}
    auxiliaries, pairs = choose_auxiliaries(targets, 3)
    assert len(auxiliaries) == 60 and len(set(auxiliaries)) == 60
    for auxiliary in auxiliaries:
        owners = [cells[target] for target, name in pairs if name == auxiliary.name]
        assert {owner.family for owner in owners} == {auxiliary.family}
        if auxiliary.cell in BETWEEN:
            assert np.allclose(np.mean([owner.cell for owner in owners], axis=0), auxiliary.cell)
        else:
            assert len(owners) == 1 and math.dist(owners[0].cell, auxiliary.cell) == 1


def dominant_frequency(images: np.ndarray) -> np.ndarray:
    """Cycles per image of the strongest spatial frequency of each (N, S, S) grey image."""
    spectrum = np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True)))
    fy, fx = np.unravel_index(spectrum.reshape(len(images), -1).argmax(1), images.shape[1:])
    size = images.shape[1]
    return np.hypot(np.minimum(fy, size - fy), np.minimum(fx, size - fx))


def test_the_named_property_can_be_measured_in_the_image() -> None:
    stripes, rng = FAMILIES[0], np.random.default_rng(0)
    broad, narrow = (
        np.median(dominant_frequency(render(Texture(stripes, cell), 40, 64, rng).mean(-1)))
        for cell in ((1, 1), (3, 1))
    )
    # 3.6 and 7.2 cycles per image, scaled by up to 15%
    assert 2.8 < broad < 4.5 and 5.8 < narrow < 9.0


@pytest.mark.parametrize("family", range(len(FAMILIES)))
@pytest.mark.parametrize("cell", [RING[0], (4, 3), (3, 4), (0, 3)])
def test_every_family_draws_both_colours_at_every_edge_of_its_grid(
    family: int, cell: tuple[int, int]
) -> None:
    texture = Texture(FAMILIES[family], cell)
    u, v = (np.mgrid[0:64, 0:64][:, None] / 64).astype(np.float32)
    a, b = (
        axis.at(np.full((1, 1, 1), level))
        for axis, level in zip((texture.family.a, texture.family.b), cell, strict=True)
    )
    coverage = texture.family.draw(a, b, u, v, np.random.default_rng(0))
    assert coverage.shape == (1, 64, 64) and coverage.dtype == np.float32
    assert (
        0 <= coverage.min() <= 0.01 and 0.6 <= coverage.max() <= 1 and 0.03 < coverage.mean() < 0.8
    )


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_demo_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_empty_folder_is_filled_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    out = tmp_path / "data"
    out.mkdir()
    write_demo_data(out, targets=2, head=1, images_per_auxiliary=1, val_per_class=1, size=16)
    assert sorted(path.name for path in out.iterdir()) == [
        "auxiliary",
        "pairs.csv",
        "target",
        "val",
    ]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("targets", 1),
        ("targets", 21),
        ("auxiliaries_per_target", 4),
        ("imbalance", 0.5),
        ("size", 8),
        ("head", 0),
        ("val_per_class", 0),
    ],
)
def test_arguments_out_of_range_are_named(tmp_path: Path, name: str, value: int) -> None:
    with pytest.raises(UserError, match=f"{name} is {value}"):
        write_demo_data(tmp_path / "d", **{name: value})  # type: ignore[arg-type]
    assert not (tmp_path / "d").exists()
