"""Small pictures for pages that are one file."""

import base64
import io

from PIL import Image, ImageOps

THUMBNAIL = 112  # pixels a side


def thumbnail(encoded: bytes) -> str:
    """A data URI of a small, square JPEG; empty where the image cannot be decoded."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            # a JPEG is decoded at a fraction of its size
            image.draft("RGB", (2 * THUMBNAIL, 2 * THUMBNAIL))
            return thumbnail_of(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return ""


def thumbnail_of(small: Image.Image) -> str:
    """A data URI of a small, square JPEG of an upright RGB image."""
    small = ImageOps.fit(small, (min(THUMBNAIL, min(small.size)),) * 2)
    out = io.BytesIO()
    small.save(out, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
