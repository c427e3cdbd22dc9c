"""Files of more than eight bits a value, written here where Pillow writes grey ones only."""

import io
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels


def png16(values: np.ndarray, key: tuple[int, ...] = ()) -> bytes:
    """Return (H, W, channels) uint16 as a PNG; key is the value that is transparent."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, 0)
    transparent = _chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    return (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", header)
        + transparent
        + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )


def _chunk(name: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + check


def tiff(values: np.ndarray, compression: str | None = None, **tags: int) -> bytes:
    """As Pillow writes it: grey alone."""
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for number, value in tags.items():
        info[int(number[1:])] = value
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", compression=compression, tiffinfo=info)
    return buffer.getvalue()


def rgb_tiff(values: np.ndarray, order: str = "<") -> bytes:
    """(H, W, 3) or (H, W, 4) uint16 in one strip, not compressed."""
    height, width, channels = values.shape
    entries = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, 0),  # bits: behind the directory
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 0),  # the strip: behind them
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, 1, values.size * 2),
    ]
    if channels == 4:
        entries.append((338, 3, 1, 2))
    end = 8 + 2 + 12 * len(entries) + 4
    places = {258: end, 273: end + 2 * channels}
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, 8)
    data += struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        value = places.get(tag, value)
        form = "HHI" + ("HH" if kind == 3 and count == 1 else "I")
        rest = (value, 0) if kind == 3 and count == 1 else (value,)
        data += struct.pack(order + form, tag, kind, count, *rest)
    data += struct.pack(f"{order}I", 0) + struct.pack(f"{order}{channels}H", *[16] * channels)
    return data + values.astype(f"{order}u2").tobytes()


def netpbm(values: np.ndarray) -> bytes:
    height, width = values.shape[:2]
    magic = "P6" if values.ndim == 3 else "P5"
    return f"{magic}\n{width} {height}\n65535\n".encode() + values.astype(">u2").tobytes()
