"""The word of hosts and authors on machine learning: in headers, in pages, in images."""

import re
from collections.abc import Iterable
from contextlib import suppress
from html.parser import HTMLParser

from PIL import Image

AGENT = "fastlt"
OPT_OUTS = {"noai", "noimageai", "noml"}
RULES_WITH_VALUES = {"max-image-preview", "max-snippet", "max-video-preview", "unavailable_after"}
# of the property plus:DataMining of IPTC, but for what is about generating images alone
DATA_MINING = re.compile(rb"DMI-PROHIBITED(?!-GENAIMLTRAINING)")


def opted_out(tags: Iterable[str]) -> bool:
    """Return whether rules for robots ask to be left out of machine learning.

    tags: values of X-Robots-Tag or of robots' meta tags: rules, separated by commas, those after
    `agent:` for that agent alone.
    """
    for tag in tags:
        agent = ""
        for part in tag.split(","):
            name, colon, rule = part.partition(":")
            if colon and name.strip().lower() not in RULES_WITH_VALUES:
                agent = name.strip().lower()
            elif colon:
                continue
            word = (rule if colon else part).strip().lower()
            if word in OPT_OUTS and agent in ("", "*", AGENT):
                return True
    return False


def page_opts_out(page: str) -> bool:
    """Return whether a page in HTML does, by `<meta name="robots">`, or one for us alone."""
    found = MetaTags()
    with suppress(AssertionError):  # of a declaration that is none
        found.feed(page)
    return opted_out(found.rules)


def image_opts_out(image: Image.Image, data: bytes) -> bool:
    """Return whether the metadata of an image, opened from data, forbid to mine it for training."""
    # of a PNG they may be compressed
    found = [data, *(image.info.get(name) or b"" for name in ("xmp", "XML:com.adobe.xmp"))]
    return any(
        DATA_MINING.search(text.encode("utf-8", "replace") if isinstance(text, str) else text)
        for text in found
    )


class MetaTags(HTMLParser):
    """Collects the rules for robots in the meta tags of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rules: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a meta tag that is for us."""
        values = {name: value or "" for name, value in attrs}
        if tag == "meta" and values.get("name", "").strip().lower() in ("robots", AGENT):
            self.rules.append(values.get("content", ""))
