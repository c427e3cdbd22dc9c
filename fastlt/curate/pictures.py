"""The check that bytes are a picture that can be used, whatever they claim to be."""

from typing import NamedTuple

from fastlt.curate.fetch import Refused
from fastlt.curate.opt_outs import image_opts_out
from fastlt.curate.settings import RetrieveConfig
from fastlt.decode.formats import FORMATS
from fastlt.decode.images import BadImage, load, open_image, orientation


class Picture(NamedTuple):
    """An image that can be used, and its size."""

    extension: str  # .jpg, .png or .webp
    height: int  # upright, pixels
    width: int


def examine(data: bytes, settings: RetrieveConfig) -> Picture:
    """Return the picture of some bytes, decoded unless its header promises too many pixels.

    Raises Refused.
    """
    try:
        image = open_image(data, settings.max_pixels)
        if image_opts_out(image, data):
            raise Refused("opted out of machine learning by its metadata")
        if min(image.size) < settings.min_side:
            raise Refused("too small")
        if (
            getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
        ):  # a JPEG with a second picture behind it, as phones make
            raise Refused("an animation")
        load(image, data)
    except BadImage as error:
        raise Refused(reason_of(str(error))) from error
    width, height = image.size if orientation(image) < 5 else image.size[::-1]
    return Picture(FORMATS.get(str(image.format), ".jpg"), height, width)


def reason_of(message: str) -> str:
    """Return a message without figures, so that reasons can be counted."""
    if "are more than the limit" in message:
        return "too many pixels"
    return message.partition(":")[0]
