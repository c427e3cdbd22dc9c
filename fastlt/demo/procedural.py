"""The demo's data: procedural textures whose auxiliaries are near variants of their targets.

A family (stripes, spots, waves, polygons, lattices) has two axes of five named levels, so 25 cells;
a class is one cell and its images are drawn uniformly from within it. Targets stand two cells
apart, auxiliaries between and around them:

        0   1   2   3   4          T  target
    0       a       a'             b  between two targets of the ring: neighbour of both
    1   a'  T   b   T   a          a  around one target: its neighbour alone; a' the second one
    2       b       b
    3   a   T   b   T   a'
    4       a'      a

Everything that does not make the class varies: pose, colour, contrast, lighting, noise, occlusion
and background.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from fastlt.errors import UserError
from fastlt.utils.files import whole_folder
from fastlt.utils.long_tail import long_tail

Array = np.ndarray
Cell = tuple[int, int]
# (a, b) of shape (N, 1, 1), u, v of shape (N, S, S) in image widths, rng -> coverage of the
# foreground in [0, 1], (N, S, S)
Draw = Callable[[Array, Array, Array, Array, np.random.Generator], Array]

RING: tuple[Cell, ...] = ((1, 1), (1, 3), (3, 3), (3, 1))
# BETWEEN[k] lies between RING[k] and RING[k + 1]
BETWEEN: tuple[Cell, ...] = (
    (1, 2),
    (2, 3),
    (3, 2),
    (2, 1),
)
AROUND: tuple[tuple[Cell, Cell], ...] = (
    ((0, 1), (1, 0)),
    ((1, 4), (0, 3)),
    ((4, 3), (3, 4)),
    ((3, 0), (4, 1)),
)
# half the width of a cell, a little less than one half so that classes do not overlap
WITHIN_CELL = 0.45
BATCH = 128  # images drawn at once: 128 x 64 x 64 floats stay in the cache


@dataclass(frozen=True)
class Axis:
    """Five named levels of one property, and the value of the property at each."""

    words: tuple[str, ...]
    values: tuple[float, ...]

    def at(self, position: Array) -> Array:
        """Return the values at positions between the levels."""
        return np.interp(position, range(len(self.values)), self.values).astype(np.float32)


@dataclass(frozen=True)
class Family:
    """A kind of texture: two axes, the function that draws it, and how far its pose may turn
    (radians).
    """

    noun: str
    a: Axis
    b: Axis
    draw: Draw
    turn: float

    def name(self, cell: Cell) -> str:
        """Return the name of the texture in a cell."""
        return "-".join(filter(None, (self.a.words[cell[0]], self.b.words[cell[1]], self.noun)))


@dataclass(frozen=True)
class Texture:
    """A class: one cell of one family."""

    family: Family
    cell: Cell

    @property
    def name(self) -> str:
        """The name of the class."""
        return self.family.name(self.cell)


def write_demo_data(
    out: Path,
    *,
    targets: int = 20,
    auxiliaries_per_target: int = 2,
    imbalance: float = 100,
    size: int = 64,
    head: int = 200,
    images_per_auxiliary: int = 60,
    val_per_class: int = 40,
    seed: int = 0,
) -> None:
    """Write a fine-grained long-tailed data set as image folders.

    It takes 2 s on one core for the 4,100 images of the defaults.

    `out/target/<class>/*.jpg` (long-tailed: `int(head * (1 / imbalance) ** (i / (targets - 1)))`
    images, at least one), `out/auxiliary/<class>/*.jpg` and `out/val/<class>/*.jpg` (balanced),
    JPEGs of `size` x `size` pixels, and `out/pairs.csv` with the header `target,auxiliary`: an
    auxiliary between two targets is a neighbour of both. `auxiliaries_per_target` is how many are
    made per target (1..3; a target has up to one more neighbour, the one made for the target before
    it in the ring). The same arguments give the same files.

    Raises:
        UserError: `out` exists and is not an empty folder, or an argument is out of range.

    """
    _check(
        out,
        targets,
        auxiliaries_per_target,
        imbalance,
        size,
        head,
        images_per_auxiliary,
        val_per_class,
    )
    classes = choose_targets(targets, seed)
    auxiliaries, pairs = choose_auxiliaries(classes, auxiliaries_per_target)
    splits = (
        ("target", classes, long_tail(head, imbalance, targets, least=1)),
        ("auxiliary", auxiliaries, [images_per_auxiliary] * len(auxiliaries)),
        ("val", classes, [val_per_class] * targets),
    )
    with whole_folder(out) as temporary:
        for split, (group, textures, counts) in enumerate(splits):
            for index, (texture, count) in enumerate(zip(textures, counts, strict=True)):
                _write_class(
                    temporary / group / texture.name,
                    texture,
                    count,
                    size,
                    np.random.default_rng([seed, split, index]),
                )
        rows = [f"{target},{auxiliary}\n" for target, auxiliary in pairs]
        (temporary / "pairs.csv").write_text("target,auxiliary\n" + "".join(rows), encoding="utf-8")


def choose_targets(targets: int, seed: int) -> list[Texture]:
    """Return the target classes, most frequent first.

    Each run of five has every family once, so families mix head and tail.
    """
    rng = np.random.default_rng([seed, len(FAMILIES)])
    # (families, 4): which corner comes when
    corners = np.stack([rng.permutation(len(RING)) for _ in FAMILIES])
    order = [
        (family, corners[family, turn])
        for turn in range(len(RING))
        for family in rng.permutation(len(FAMILIES))
    ]
    return [Texture(FAMILIES[family], RING[corner]) for family, corner in order[:targets]]


def choose_auxiliaries(
    targets: list[Texture], per_target: int
) -> tuple[list[Texture], list[tuple[str, str]]]:
    """Return the auxiliaries, `per_target` of each target, and (target, auxiliary) name pairs."""
    present = set(targets)
    auxiliaries, pairs = [], []
    for target in targets:
        corner = RING.index(target.cell)
        following = Texture(target.family, RING[(corner + 1) % len(RING)])
        for cell in (BETWEEN[corner], *AROUND[corner])[:per_target]:
            auxiliary = Texture(target.family, cell)
            auxiliaries.append(auxiliary)
            pairs.append((target.name, auxiliary.name))
            if cell == BETWEEN[corner] and following in present:
                pairs.append((following.name, auxiliary.name))
    return auxiliaries, pairs


def render(texture: Texture, count: int, size: int, rng: np.random.Generator) -> Array:
    """Return `count` images of one class, (count, size, size, 3) uint8."""
    cell = np.asarray(texture.cell)[:, None, None, None]
    a, b = cell + rng.uniform(-WITHIN_CELL, WITHIN_CELL, (2, count, 1, 1))
    u, v = _pose(count, size, texture.family.turn, rng)
    foreground = texture.family.draw(texture.family.a.at(a), texture.family.b.at(b), u, v, rng)
    return _photograph(foreground, rng)


def _check(
    out: Path,
    targets: int,
    per_target: int,
    imbalance: float,
    size: int,
    head: int,
    per_auxiliary: int,
    per_val: int,
) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists: remove it or name another folder for the demo data")
    most = len(RING) * len(FAMILIES)
    for name, value, low, high in (
        ("targets", targets, 2, most),
        ("auxiliaries_per_target", per_target, 1, 3),
        ("imbalance", imbalance, 1, float("inf")),
        ("size", size, 16, 1024),
        ("head", head, 1, float("inf")),
        ("images_per_auxiliary", per_auxiliary, 1, float("inf")),
        ("val_per_class", per_val, 1, float("inf")),
    ):
        if not low <= value <= high:
            raise UserError(f"demo data: {name} is {value}, must be from {low} to {high}")


def _write_class(
    folder: Path, texture: Texture, count: int, size: int, rng: np.random.Generator
) -> None:
    folder.mkdir(parents=True)
    for start in range(0, count, BATCH):
        images = render(texture, min(BATCH, count - start), size, rng)
        for index, image in enumerate(images, start):
            Image.fromarray(image).save(folder / f"{index:04d}.jpg", quality=88)


# Families
# -------------------------------------------------------------------------------------------------


def _stripes(frequency: Array, angle: Array, u: Array, v: Array, rng: np.random.Generator) -> Array:
    # Either sign of the angle, so that a mirrored image is of the same class.
    angle = np.deg2rad(angle) * rng.choice([-1, 1], angle.shape).astype(np.float32)
    return _bars(
        (v * np.cos(angle) + u * np.sin(angle)) * frequency,
        _uniform(rng, 0.35, 0.65, angle),
        frequency,
        rng,
    )


def _waves(
    amplitude: Array, frequency: Array, u: Array, v: Array, rng: np.random.Generator
) -> Array:
    bars = _uniform(rng, 3.5, 6.0, amplitude)
    swing = amplitude * np.sin(2 * np.pi * (v * frequency + _uniform(rng, 0, 1, amplitude)))
    return _bars((u + swing) * bars, _uniform(rng, 0.35, 0.6, amplitude), bars, rng)


def _lattices(
    thickness: Array, crossing: Array, u: Array, v: Array, rng: np.random.Generator
) -> Array:
    frequency = _uniform(rng, 3.2, 5.0, crossing)
    crossing = np.deg2rad(crossing)
    first = _bars(u * frequency, thickness, frequency, rng)
    return np.maximum(
        first,
        _bars((u * np.cos(crossing) + v * np.sin(crossing)) * frequency, thickness, frequency, rng),
    )


def _spots(radius: Array, elongation: Array, u: Array, v: Array, rng: np.random.Generator) -> Array:
    frequency = _uniform(rng, 3.2, 4.8, radius)
    long = radius * np.sqrt(elongation)
    du, dv, turn = _scatter(u * frequency, v * frequency, 0.8 * (0.5 - long), rng)
    # one direction per image, a little disorder
    turn = turn * 0.08 + _uniform(rng, 0, np.pi, radius)
    along, across = du * np.cos(turn) + dv * np.sin(turn), dv * np.cos(turn) - du * np.sin(turn)
    distance = np.hypot(along / long, across * elongation / long)
    return _edge((1 - distance) * radius, frequency, radius, rng)


def _polygons(
    thickness: Array, sides: Array, u: Array, v: Array, rng: np.random.Generator
) -> Array:
    sides = np.rint(sides)
    frequency = _uniform(rng, 2.0, 3.2, sides)
    radius = _uniform(rng, 0.34, 0.44, sides)
    du, dv, turn = _scatter(u * frequency, v * frequency, 0.5 - radius, rng)
    wedge = np.mod(np.arctan2(dv, du) + turn, 2 * np.pi / sides) - np.pi / sides
    # towards the nearest side, inside > 0
    depth = radius * np.cos(np.pi / sides) - np.hypot(du, dv) * np.cos(wedge)
    inner = thickness * radius * np.cos(np.pi / sides)
    return _edge(np.minimum(depth, inner - depth), frequency, radius, rng)


FAMILIES: tuple[Family, ...] = (
    Family(
        "stripes",
        # cycles per image
        Axis(("wide", "broad", "medium", "narrow", "fine"), (2.5, 3.6, 5.1, 7.2, 10.0)),
        # degrees
        Axis(("level", "slanted", "diagonal", "steep", "upright"), (0, 22.5, 45, 67.5, 90)),
        _stripes,
        turn=0.0,
    ),
    Family(
        "waves",
        # image widths
        Axis(("faint", "gentle", "rolling", "tall", "towering"), (0.008, 0.022, 0.04, 0.062, 0.09)),
        # cycles per image
        Axis(("long", "stretched", "even", "short", "choppy"), (1.0, 1.5, 2.2, 3.2, 4.6)),
        _waves,
        turn=np.pi,
    ),
    Family(
        "lattice",
        # periods
        Axis(("thread", "thin", "medium", "thick", "heavy"), (0.12, 0.2, 0.29, 0.39, 0.5)),
        # degrees between the bars
        Axis(("square", "leaning", "slanted", "sharp", "flat"), (90, 75, 60, 46, 33)),
        _lattices,
        turn=np.pi,
    ),
    Family(
        "spots",
        # periods
        Axis(("tiny", "small", "medium", "large", "huge"), (0.11, 0.145, 0.19, 0.245, 0.3)),
        # length over width
        Axis(("round", "oval", "oblong", "long", "slender"), (1.0, 1.35, 1.75, 2.2, 2.7)),
        _spots,
        turn=np.pi,
    ),
    Family(
        "",
        # of the inner radius
        Axis(("hairline", "thin", "bold", "heavy", "solid"), (0.18, 0.3, 0.46, 0.68, 1.0)),
        Axis(("triangles", "squares", "pentagons", "hexagons", "heptagons"), (3, 4, 5, 6, 7)),
        _polygons,
        turn=np.pi,
    ),
)


def _bars(phase: Array, duty: Array, frequency: Array, rng: np.random.Generator) -> Array:
    """Return parallel bars: `duty` of each unit of `phase` is covered."""
    offset = np.abs(np.mod(phase + _uniform(rng, 0, 1, duty), 1) - 0.5)
    return _edge(duty / 2 - offset, frequency, duty, rng)


def _edge(depth: Array, frequency: Array, like: Array, rng: np.random.Generator) -> Array:
    """Return coverage from the depth below an edge (in periods, inside > 0).

    It is blurred over one or two 64ths of the image.
    """
    blur = _uniform(rng, 1 / 64, 2 / 64, like) * frequency
    return np.clip(depth / blur + 0.5, 0, 1)


def _scatter(
    x: Array, y: Array, reach: Array, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Return offsets from the centre of a shape per unit cell, and an angle per shape (radians).

    The centre is moved by up to `reach`.
    """
    table = rng.uniform(-1, 1, (3, len(x), 16, 16)).astype(np.float32)
    row, column = np.floor(x), np.floor(y)
    where = (np.arange(len(x))[:, None, None], row.astype(int) % 16, column.astype(int) % 16)
    dx, dy, turn = table[0][where], table[1][where], table[2][where]
    return x - row - 0.5 - reach * dx, y - column - 0.5 - reach * dy, np.pi * turn


# What does not make the class
# ---------------------------------------------------------------------------------------


def _uniform(rng: np.random.Generator, low: float, high: float, like: Array) -> Array:
    return rng.uniform(low, high, like.shape).astype(np.float32)


def _pose(count: int, size: int, turn: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Return coordinates (count, size, size) in image widths.

    They are shifted, turned, scaled by up to 15% and gently warped.
    """
    one = np.empty((count, 1, 1), np.float32)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size - 0.5)[None]
    x, y = axis[:, None, :], axis[:, :, None]
    warp = _uniform(rng, 0, 0.015, one)
    x, y = (
        x
        + warp * np.sin(2 * np.pi * (y * _uniform(rng, 0.5, 1.5, one) + _uniform(rng, 0, 1, one))),
        y
        + warp * np.sin(2 * np.pi * (x * _uniform(rng, 0.5, 1.5, one) + _uniform(rng, 0, 1, one))),
    )
    angle, scale = _uniform(rng, -turn, turn, one), np.exp(_uniform(rng, -0.15, 0.15, one))
    cosine, sine = np.cos(angle) * scale, np.sin(angle) * scale
    return x * cosine - y * sine + _uniform(rng, -1, 1, one), x * sine + y * cosine + _uniform(
        rng, -1, 1, one
    )


def _photograph(foreground: Array, rng: np.random.Generator) -> Array:
    """Return images (N, S, S, 3) uint8 of a coverage (N, S, S).

    They get colour, background, lighting, occlusion and noise.
    """
    count, size, _ = foreground.shape
    one = np.empty((count, 1, 1, 1), np.float32)
    back, colour = rng.random((2, count, 1, 1, 3), np.float32)
    # From each channel towards its farther end, so that the contrast survives clipping.
    front = back + np.where(back > 0.5, -1, 1) * _uniform(rng, 0.35, 0.8, one) * (
        0.35 + 0.65 * colour
    )
    clutter = _uniform(rng, 0, 0.2, one) * _clouds(count, size, 7, rng)[..., None]
    image = back + clutter + foreground[..., None] * (front - back)
    image *= 1 + _uniform(rng, 0, 0.4, one) * _clouds(count, size, 3, rng)[..., None]
    image = _occlude(image, rng)
    image += _uniform(rng, 0.01, 0.07, one) * rng.standard_normal(
        (count, size, size, 1), np.float32
    )
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _occlude(image: Array, rng: np.random.Generator) -> Array:
    """Return images (N, S, S, 3) with up to two ellipses of one colour each."""
    count, size = image.shape[:2]
    axis = np.linspace(0, 1, size, dtype=np.float32)
    for _ in range(2):
        x, y, width, height = rng.random((4, count, 1, 1), np.float32)
        reach = 0.08 + 0.24 * width, 0.08 + 0.24 * height
        inside = ((axis[None, None, :] - x) / reach[0]) ** 2 + (
            (axis[None, :, None] - y) / reach[1]
        ) ** 2 < 1
        inside &= rng.random((count, 1, 1)) < 0.5
        image = np.where(inside[..., None], rng.random((count, 1, 1, 3), np.float32), image)
    return image


def _clouds(count: int, size: int, knots: int, rng: np.random.Generator) -> Array:
    """Return smooth noise in [-1, 1], (count, size, size).

    It is interpolated between `knots` x `knots` random values.
    """
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    # (size, knots)
    weight = np.clip(1 - np.abs(position[:, None] - np.arange(knots, dtype=np.float32)), 0, 1)
    return weight @ rng.uniform(-1, 1, (count, knots, knots)).astype(np.float32) @ weight.T
