"""The kinds of image files: by their names, and by the bytes that they begin with."""

import re
from importlib import import_module
from pathlib import Path

# of a file, without regard to case
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".avif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".heic", ".heif", ".hif", ".jxl"),
)
JPEG_EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif")
# as Pillow calls them, each with the extension that files of it get here
FORMATS = {
    "JPEG": ".jpg",
    "MPO": ".jpg",  # a JPEG with others behind it, as phones make them
    "PNG": ".png",
    "WEBP": ".webp",
    "GIF": ".gif",
    "AVIF": ".avif",
    "BMP": ".bmp",
    "DIB": ".bmp",
    "TIFF": ".tif",
    "PPM": ".ppm",
    "HEIF": ".heic",
    "JXL": ".jxl",
}
# what Pillow reads with a library more: format -> (name, module, library, function to call)
PLUGINS = {
    "HEIF": ("HEIC", "pillow_heif", "pillow-heif", "register_heif_opener"),
    "JXL": ("JPEG XL", "pillow_jxl", "pillow-jxl-plugin", ""),
}
HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
HEAD = 32  # bytes that `kind_of` needs
# the extension of a name, not a number (scan.0001) or a part of a title (St. Louis)
EXTENSION = re.compile(r"\.[a-z][a-z0-9]{0,4}", re.IGNORECASE)


def is_image_file(path: Path | str) -> bool:
    """Return whether a file is an image: by its extension, or where its name has none by the bytes
    that it begins with.
    """
    suffix = Path(path).suffix
    if suffix.lower() in EXTENSIONS:
        return True
    return not EXTENSION.fullmatch(suffix) and kind_of(_head(Path(path))) is not None


def kind_of(data: bytes | memoryview) -> str | None:
    """Return the format that bytes begin as, in Pillow's words; None where it is none of ours."""
    head = bytes(data[:HEAD])
    if head[4:8] == b"ftyp":  # ISO's container, of films too
        if head[8:12] in (b"avif", b"avis"):
            return "AVIF"
        return "HEIF" if head[8:12] in HEIF_BRANDS else None
    if head[:4] == b"RIFF":
        return "WEBP" if head[8:12] == b"WEBP" else None
    return next((kind for start, kind in STARTS.items() if head.startswith(start)), None)


STARTS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\xff\x0a": "JXL",
    b"\0\0\0\x0cJXL ": "JXL",
} | {b"P%d%c" % (kind, space): "PPM" for kind in range(1, 7) for space in b" \t\r\n"}


def register(kind: str) -> str:
    """Teach Pillow a format that it reads with another library.

    Return the reason where that library is not installed.
    """
    name, module, library, function = PLUGINS[kind]
    try:
        plugin = import_module(module)
    except ImportError:
        return f'a {name} image, which needs {library}: pip install "fastlt[formats]"'
    if function:
        getattr(plugin, function)()
    return ""


def _head(path: Path) -> bytes:
    try:
        # opening a named pipe would wait for ever
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(HEAD)
    except OSError:
        return b""
