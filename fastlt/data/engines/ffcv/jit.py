"""From the bytes in a .beton to the output square, compiled by numba: what images.py says, bit for
bit.

Needs numba and ffcv's shared library; import it through `fastlt.data.engines.ffcv.native`. One
file, because numba notices a change of this file alone when it decides whether the compiled code
that it has kept is still good.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import ffcv
import numpy as np
from llvmlite import binding
from numba import njit, types

# columns of a row of the plan
IMAGE, TOP, LEFT, HEIGHT, WIDTH, FLIP, STATUS, ROW = (
    0,
    1,
    2,
    3,
    4,
    5,
    6,
    7,
)
# columns of an image
STORED_MODE, STORED_TURN, STORED_HEIGHT, STORED_WIDTH, STORED_AT, STORED_SIZE = (
    0,
    1,
    2,
    3,
    4,
    5,
)
JPEG, RAW = 0, 1
SOUND, DAMAGED = 0, 1
BITS = 22  # of the weights of Pillow's resampling: 32 less 8 of a pixel and 2 to spare


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled at the first call; the code is kept for later processes where there is a folder to
    keep it in.
    """
    try:
        return njit(function, nogil=True, error_model="numpy", cache=True)
    except RuntimeError:
        return njit(function, nogil=True, error_model="numpy")


def _turbojpeg(name: str, signature: Any) -> Any:
    # FFCV's own imdecode asks for the fast DCT, which is off by 1.2 grey levels on photos and no
    # faster.
    # a symbol is looked up in the libraries that it needs, too
    library = ctypes.CDLL(ffcv._libffcv.__file__)
    binding.add_symbol(name, ctypes.cast(getattr(library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, signature)


_pointer, _int = types.intp, types.int32
tj_init = _turbojpeg("tjInitDecompress", _pointer())
tj_decompress = _turbojpeg(
    "tjDecompress2", _int(_pointer, _pointer, types.uint64, _pointer, _int, _int, _int, _int, _int)
)
tj_destroy = _turbojpeg("tjDestroy", _int(_pointer))


def _decode_jpeg(data, pixels):
    """Decode data (bytes,) uint8 into pixels (H, W, 3) uint8, not turned.

    Returns SOUND, or DAMAGED on an error or a warning.
    """
    height, width = np.int32(pixels.shape[0]), np.int32(pixels.shape[1])
    handle = tj_init()
    zero = np.int32(0)  # pitch as is, RGB, exact DCT
    result = tj_decompress(
        handle,
        data.ctypes.data,
        np.uint64(data.size),
        pixels.ctypes.data,
        width,
        zero,
        height,
        zero,
        zero,
    )
    tj_destroy(handle)
    return SOUND if result == 0 else DAMAGED


decode_jpeg = compiled(_decode_jpeg)


def _upright(pixels, turn):
    """Undo the EXIF orientation `turn`, 2..8."""
    rows, columns = pixels.shape[0], pixels.shape[1]
    quarter = turn >= 5
    rows_back = turn == 3 or turn == 4 or turn == 6 or turn == 7
    columns_back = turn == 2 or turn == 3 or turn == 7 or turn == 8
    result = np.empty((columns, rows, 3) if quarter else (rows, columns, 3), np.uint8)
    for y in range(result.shape[0]):
        for x in range(result.shape[1]):
            row, column = (x, y) if quarter else (y, x)
            row = rows - 1 - row if rows_back else row
            column = columns - 1 - column if columns_back else column
            for channel in range(3):
                result[y, x, channel] = pixels[row, column, channel]
    return result


upright = compiled(_upright)


def _copy(source, destination):
    """Flat arrays. A loop, for numba takes seconds to compile an assignment of slices."""
    for i in range(len(source)):
        destination[i] = source[i]


copy = compiled(_copy)


def _cut(pixels, top, left, flip, out):
    """The part of the image at (top, left) that is as large as `out`, black beyond the edge."""
    height, width = out.shape[0], out.shape[1]
    first, last = max(0, -left), min(width, pixels.shape[1] - left)
    for y in range(height):
        row = y + top
        inside = 0 <= row < pixels.shape[0] and first < last
        if not inside or last - first < width:
            for x in range(width):
                out[y, x, 0] = out[y, x, 1] = out[y, x, 2] = 0
        if inside:
            copy(
                pixels[row, left + first : left + last].reshape(-1), out[y, first:last].reshape(-1)
            )
        if inside and flip:
            mirror(out[y])


def _mirror(row):
    width = len(row)
    for x in range(width // 2):
        for channel in range(3):
            other = row[width - 1 - x, channel]
            row[width - 1 - x, channel] = row[x, channel]
            row[x, channel] = other


mirror = compiled(_mirror)
cut = compiled(_cut)


def _weigh(length, start, extent, size, box):
    """Pillow's weights from `extent` pixels, of `length`, to `size`: first pixel, number of pixels,
    fixed-point weights.
    """
    scale = extent / size
    stretch = max(scale, 1.0)
    support = (0.5 if box else 1.0) * stretch
    first, count = np.empty(size, np.int32), np.empty(size, np.int32)
    weights = np.empty((size, int(np.ceil(support)) * 2 + 1), np.int32)
    exact = np.empty(weights.shape[1])
    for x in range(size):
        centre = start + (x + 0.5) * scale
        first[x] = max(int(centre - support + 0.5), 0)
        count[x] = min(int(centre + support + 0.5), length) - first[x]
        total = 0.0
        for k in range(count[x]):
            distance = (k + first[x] - centre + 0.5) * (1.0 / stretch)
            inside = 1.0 if -0.5 < distance <= 0.5 else 0.0
            exact[k] = inside if box else max(0.0, 1.0 - abs(distance))
            total += exact[k]
        for k in range(count[x]):
            weights[x, k] = int(0.5 + exact[k] / total * (1 << BITS))
    return first, count, weights


weigh = compiled(_weigh)


def _across(pixels, top, bottom, first, count, weights, flip):
    """The horizontal pass over the rows top..bottom, rounded to 8 bits as Pillow does."""
    size = len(first)
    half = np.int32(1 << (BITS - 1))
    result = np.empty((bottom - top, size, 3), np.uint8)
    for y in range(top, bottom):
        for x in range(size):
            red = green = blue = half
            for k in range(count[x]):
                weight, column = weights[x, k], first[x] + k
                red += np.int32(weight * np.int32(pixels[y, column, 0]))
                green += np.int32(weight * np.int32(pixels[y, column, 1]))
                blue += np.int32(weight * np.int32(pixels[y, column, 2]))
            place = size - 1 - x if flip else x
            result[y - top, place, 0] = red >> BITS
            result[y - top, place, 1] = green >> BITS
            result[y - top, place, 2] = blue >> BITS
    return result


across = compiled(_across)


def _down(rows, first, count, weights, out):
    """The vertical pass: rows (R, size * 3) to out (size, size * 3), both uint8."""
    sums = np.empty(rows.shape[1], np.int32)
    for y in range(out.shape[0]):
        for x in range(rows.shape[1]):
            sums[x] = np.int32(1 << (BITS - 1))
        for k in range(count[y]):
            weight, row = weights[y, k], rows[first[y] + k]
            for x in range(rows.shape[1]):
                sums[x] += np.int32(weight * np.int32(row[x]))
        for x in range(rows.shape[1]):
            out[y, x] = sums[x] >> BITS


down = compiled(_down)


def _resize(pixels, top, left, height, width, flip, out):
    """Resize a box as Pillow does.

    BOX where both sides shrink, BILINEAR else; the horizontal pass comes first.
    """
    size = out.shape[0]
    box = min(height, width) >= size
    first_x, count_x, weights_x = weigh(pixels.shape[1], left, width, size, box)
    first_y, count_y, weights_y = weigh(pixels.shape[0], top, height, size, box)
    start, stop = first_y[0], first_y[size - 1] + count_y[size - 1]
    rows = across(pixels, start, stop, first_x, count_x, weights_x, flip)
    down(
        rows.reshape(stop - start, size * 3),
        first_y - start,
        count_y,
        weights_y,
        out.reshape(size, size * 3),
    )


resize = compiled(_resize)


def _fill_box(pixels, top, left, height, width, flip, out):
    """images.fill_box."""
    size = out.shape[0]
    if height == size and width == size:
        cut(pixels, top, left, flip, out)
    elif top < 0 or left < 0 or top + height > pixels.shape[0] or left + width > pixels.shape[1]:
        part = np.empty((height, width, 3), np.uint8)
        cut(pixels, top, left, False, part)
        resize(part, 0, 0, height, width, flip, out)
    else:
        resize(pixels, top, left, height, width, flip, out)


fill_box = compiled(_fill_box)


def _decode_row(row, image, file, out):
    data = file[image[STORED_AT] : image[STORED_AT] + image[STORED_SIZE]]
    pixels = np.empty((image[STORED_HEIGHT], image[STORED_WIDTH], 3), np.uint8)
    if image[STORED_MODE] == RAW:
        copy(data, pixels.reshape(-1))
    elif decode_jpeg(data, pixels) != SOUND:
        return DAMAGED
    if image[STORED_TURN] > 1:
        pixels = upright(pixels, image[STORED_TURN])
    fill_box(pixels, row[TOP], row[LEFT], row[HEIGHT], row[WIDTH], row[FLIP] != 0, out)
    return SOUND


decode_row = compiled(_decode_row)


def _decode_rows(rows, images, file, out):
    """Decode the rows into `out`, and set rows[:, STATUS].

    rows (n, ROW) int64, images (N, 6) int64, file (bytes,) uint8, out (n, size, size, 3) uint8.
    """
    for i in range(len(rows)):
        rows[i, STATUS] = decode_row(rows[i], images[rows[i, IMAGE]], file, out[i])


decode_rows = compiled(_decode_rows)
