"""The word of hosts and authors on machine learning."""

import io

import pytest
from helpers.scenes import scene
from PIL import PngImagePlugin

from fastlt.curate.opt_outs import image_opts_out, opted_out, page_opts_out
from fastlt.decode.images import open_image


@pytest.mark.parametrize(
    ("tags", "refused"),
    [
        ([], False),
        (["noindex, nofollow"], False),
        (["noai"], True),
        (["noindex, NoImageAI"], True),
        (["NoML"], True),
        (["noindex", "noai"], True),
        (["fastlt: noai"], True),
        (["otherbot: noai"], False),
        (["*: noimageai"], True),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], True),
        (["max-image-preview:large, noai"], True),
        (["noai, max-snippet:10"], True),
        (["otherbot: noindex, noai"], False),
        (["otherbot: noindex, fastlt: noai"], True),
    ],
)
def test_opt_outs(tags, refused):
    assert opted_out(tags) == refused


@pytest.mark.parametrize(
    ("page", "refused"),
    [
        ('<html><head><meta name="robots" content="noindex, noai"></head>', True),
        ("<META NAME='ROBOTS' CONTENT='NOIMAGEAI' />", True),
        ("<meta content=noml name=robots>", True),
        ('<meta name="fastlt" content="noai">', True),
        ('<meta name="otherbot" content="noai">', False),
        ('<meta name="robots" content="index, follow">', False),
        ('<meta name="description" content="noai">', False),
        ('<!-- <meta name="robots" content="noai"> -->', False),
        ("<p>noai</p>", False),
        ("<![if<<meta", False),
        ("", False),
    ],
)
def test_pages(page, refused):
    assert page_opts_out(page) == refused


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ("DMI-PROHIBITED", True),
        ("DMI-PROHIBITED-AIMLTRAINING", True),
        ("DMI-PROHIBITED-EXCEPTSEARCHENGINEINDEXING", True),
        ("DMI-PROHIBITED-GENAIMLTRAINING", False),
        ("DMI-ALLOWED", False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_images(kind, value, refused):
    xmp = (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description plus:DataMining='
        f'"http://ns.useplus.org/ldf/vocab/{value}"/></x:xmpmeta>'
    ).encode()
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=True)
    metadata = {"pnginfo": info} if kind == "PNG" else {"xmp": xmp}
    buffer = io.BytesIO()
    scene(20, 30).save(buffer, kind, **metadata)
    data = buffer.getvalue()
    assert image_opts_out(open_image(data), data) == refused
