"""Retrieval from a web server that serves photographs, and all that may come instead of them."""

import asyncio
import csv
import gzip
import io
import json
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

pytest.importorskip("aiohttp", reason="no aiohttp here: it comes with the extra `curate`")
from helpers.web_server import Web, web_server

from fastlt.curate import public_hosts as addresses
from fastlt.curate.fetch import open_fetcher
from fastlt.curate.retrieve import run_retrieve
from fastlt.curate.settings import CurateConfig
from fastlt.errors import UserError
from fastlt.packing.sources import read_collection

QUICK = {"per_host": 2000.0, "timeout": 3.0, "retries": 1}


def picture(seed=0, side=96, kind="JPEG") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = np.repeat(
        np.repeat(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8), 8, axis=0), 8, axis=1
    )
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@pytest.fixture
def web():
    with web_server() as server:
        yield server


def propose(out, *names):
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"name": name, "query": name, "owners": ["t"]} for name in names]
    (out / "categories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def retrieved(out, **settings):
    """What is printed, and what became of each place, the last time."""
    console = Console(record=True, width=200)
    try:
        run_retrieve(
            out,
            CurateConfig.model_validate({"retrieve": {**QUICK, "allow_private": True, **settings}}),
            console,
        )
    except UserError as error:  # what was refused is told nevertheless
        if "could be fetched" not in str(error):
            raise
    return console.export_text(), {row["place"]: row for row in rows(out)}


def rows(out):
    return [
        json.loads(line)
        for path in sorted((out / "raw").glob("*.jsonl"))
        for line in path.read_text().split("\n")
        if line
    ]


def from_urls(out, *places, category="liger", page="", **settings):
    propose(out, category)
    with (out / "urls.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["category", "url", "licence", "author", "page"])
        table.writerows([category, place, "CC BY 4.0", "A. Person", page] for place in places)
    return retrieved(out, sources=["urls"], urls=str(out / "urls.csv"), **settings)


def fetched_bytes(out, row) -> bytes:
    with (out / "raw" / row["shard"]).open("rb") as file:
        file.seek(row["offset"])
        return file.read(row["size"])


# --- what is fetched


def test_pages_that_opt_out_are_honoured_and_read_once(web: Web, tmp_path):
    places = [web.file(f"/{i}.jpg", picture(i)) for i in range(3)]
    page = web.file("/gallery", b'<meta name="robots" content="noai">', "text/html")
    moved = web.status("/old", 302, Location="/gallery")
    for number, (shown_at, settings, is_refused) in enumerate(
        [
            (page, {}, True),
            (moved, {}, True),
            (web.file("/open", b"<html>", "text/html"), {}, False),
            (web.status("/away", 404), {}, False),
            (web.file("/head", b"", "text/html", X_Robots_Tag="noml"), {}, True),
            (page, {"ask_pages": False}, False),
        ]
    ):
        before = web.asked["/gallery"]
        _, found = from_urls(tmp_path / str(number), *places, page=shown_at, **settings)
        reasons = {row.get("reason") for row in found.values()}
        assert reasons == {"opted out of machine learning by its page" if is_refused else None}
        assert web.asked["/gallery"] - before <= 1


def test_what_strangers_send_loses_nothing(web: Web, tmp_path):
    """Titles that end lines, a robots.txt that is none, and a phone's JPEG with a second picture
    behind it.
    """
    propose(tmp_path, "liger")
    good = web.file("/a.jpg", picture())
    file = io.BytesIO()
    first, second = (Image.open(io.BytesIO(picture(seed))) for seed in (1, 2))
    first.save(file, "MPO", save_all=True, append_images=[second])
    phone = web.file("/phone.jpg", file.getvalue())
    rows_ = [
        ["liger", good, "two\u2028lines\x1c"],
        ["liger", phone, "x"],
        ["liger", web.url("/a.jpg", "localhost"), "y"],
    ]
    web.file("/robots.txt", b"User-agent: *\nDisallow: //[x\nCrawl-delay: \xc2\xb2\n", "text/plain")
    with (tmp_path / "u.csv").open("w", newline="") as lines:
        csv.writer(lines).writerows([["category", "url", "title"], *rows_])
    for _ in range(2):
        _, found = retrieved(tmp_path, sources=["urls"], urls=str(tmp_path / "u.csv"))
        assert [row["fetched"] for row in found.values()] == [True] * 3
    assert found[good]["title"] == "two\u2028lines\x1c"


def test_pictures_are_stored_as_they_are_with_their_provenance(web: Web, tmp_path):
    data = {
        web.file(f"/{i}.{kind.lower()}", picture(i, kind=kind)): picture(i, kind=kind)
        for i, kind in enumerate(["JPEG", "PNG", "WEBP"])
    }
    said, found = from_urls(tmp_path, *data)
    assert "3 images of 1 categories" in said and "licences: CC BY 4.0 3" in said
    for place, wanted in data.items():
        row = found[place]
        assert (
            fetched_bytes(tmp_path, row) == wanted and row["fetched"] and row["size"] == len(wanted)
        )
        assert (row["licence"], row["author"], row["height"], row["width"]) == (
            "CC BY 4.0",
            "A. Person",
            96,
            96,
        )
        assert len(row["sha256"]) == 64 and row["time"].startswith("20") and row["url"] == place
    with tarfile.open(tmp_path / "raw/000000.tar") as tar:
        assert {name.split(".")[1] for name in tar.getnames()} == {
            "jpg",
            "png",
            "webp",
            "cls",
            "txt",
            "json",
        }
    listing = read_collection(tmp_path / "raw", None, tmp_path / "raw")
    assert listing.target_names == ["liger"] and len(listing.train) == 3
    (agent,) = web.agents
    assert agent.startswith("fastlt/") and "research" in agent


def test_what_the_bytes_are_counts_and_not_what_they_are_called(web: Web, tmp_path):
    _, found = from_urls(
        tmp_path,
        web.file("/a.html", picture(), "text/html"),
        web.file("/b.jpg", picture(kind="PNG"), "image/jpeg"),
    )
    assert [row["fetched"] for row in found.values()] == [True, True]
    with tarfile.open(tmp_path / "raw/000000.tar") as shard:
        assert {Path(name).suffix for name in shard.getnames()} >= {".jpg", ".png"}


def bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in a few kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(10_000_000)))
        + chunk(b"IEND", b"")
    )


def animation() -> bytes:
    file = io.BytesIO()
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "blue")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def test_what_is_no_usable_picture_is_refused_by_its_reason(web: Web, tmp_path):
    good = picture()
    wanted = {
        web.file("/html.jpg", b"<html>not here</html>"): "not an image (JPEG, "
        "PNG, WebP, GIF, AVIF, BMP, TIFF or PPM)",
        web.file("/empty.jpg", b""): "empty file",
        web.file("/gif.jpg", b"GIF89a" + bytes(100)): "it begins like GIF, but its header "
        "is damaged",
        web.file("/cut.jpg", good[: len(good) // 2]): "cannot be decoded",
        web.file("/bomb.png", bomb()): "too many pixels",
        web.file("/small.png", picture(side=32, kind="PNG")): "too small",
        web.file("/moves.webp", animation()): "an animation",
        web.file("/large.jpg", good + bytes(200_000)): "too many bytes",
        web.page("/endless.jpg", lambda handler, _: handler.endless(good)): "too many bytes",
        web.page(
            "/announced.jpg", lambda handler, _: handler.endless(good, 10**12)
        ): "too many bytes",
        web.file(
            "/zip.jpg", gzip.compress(bytes(1_000_000)), Content_Encoding="gzip"
        ): "it is compressed, though that was not asked for",
        web.url("/missing.jpg"): "HTTP 404",
        web.status("/gone.jpg", 410): "HTTP 410",
        web.status("/forbidden.jpg", 403): "HTTP 403",
        web.file(
            "/noai.jpg", good, X_Robots_Tag="noindex, noai"
        ): "opted out of machine learning by X-Robots-Tag",
        web.file(
            "/noimageai.jpg", good, X_Robots_Tag="fastlt: noimageai"
        ): "opted out of machine learning by X-Robots-Tag",
        web.status("/loop", 302, Location="/loop"): "more than 5 redirects",
        web.status("/file", 302, Location="file:///etc/passwd"): "neither http nor https",
        "ftp://example.org/a.jpg": "neither http nor https",
        "not an address": "neither http nor https",
        web.file("/good.jpg", good): None,
    }
    said, found = from_urls(tmp_path, *wanted, max_bytes=150_000)
    assert {place: row.get("reason") for place, row in found.items()} == wanted
    for reason, times in Counter(reason for reason in wanted.values() if reason).items():
        assert any(str(times) in line and reason in line for line in said.splitlines())
    assert not any(row.get("transient") for row in found.values())
    before = web.asked.copy()
    _, again = from_urls(tmp_path, *wanted, max_bytes=150_000)
    assert again == found and web.asked == before  # nothing is tried again
    from_urls(tmp_path, *wanted, max_bytes=150_000, retry="all")
    assert web.asked["/missing.jpg"] == 2 and web.asked["/good.jpg"] == 1


def test_redirects_are_followed_and_looked_at_one_by_one(web: Web, tmp_path):
    web.file("/real.jpg", picture())
    first = web.status("/first", 301, Location="/second")
    web.status("/second", 307, Location=web.url("/real.jpg"))
    _, found = from_urls(tmp_path, first)
    assert found[first]["fetched"] and found[first]["url"] == web.url("/real.jpg")


def test_private_addresses_are_not_asked_however_they_are_reached(web: Web, tmp_path):
    """Without --allow-private, names and addresses alike; and a name that may be asked may not
    redirect there.
    """
    web.file("/a.jpg", picture())
    places = [
        web.url("/a.jpg", "127\u30020\u30020\u30021"),
        web.url("/a.jpg"),
        web.url("/a.jpg", "localhost"),
        web.url("/a.jpg", "127.1"),
        web.url("/a.jpg", "[::ffff:127.0.0.1]"),
    ]
    _, found = from_urls(tmp_path, *places, allow_private=False)
    reasons = [row["reason"] for row in found.values()]
    assert (
        len(reasons) == 5
        and reasons.count("a private address") >= 3
        and set(reasons) <= {"a private address", "not a valid address"}
    )
    assert not web.asked


def test_a_redirect_to_a_private_address_is_refused(web: Web, tmp_path, monkeypatch):
    """The server's own address counts as public here, and no other of this machine does."""
    original = addresses.is_public
    monkeypatch.setattr(
        addresses, "is_public", lambda address: address == "127.0.0.1" or original(address)
    )
    ways = {
        "/to-metadata": "http://169.254.169.254/latest/meta-data",
        "/to-network": "http://192.168.0.1/admin",
        "/to-other": f"http://127.0.0.2:{web.port}/a.jpg",
        "/to-name": "http://ip6-localhost.invalid./a.jpg",
    }
    places = [web.status(path, 302, Location=where) for path, where in ways.items()]
    _, found = from_urls(tmp_path, *places, allow_private=False, retries=0)
    assert [found[place]["reason"] for place in places] == ["a private address"] * 3 + [
        "the connection failed"
    ]


def test_the_connection_itself_refuses_a_private_address(web: Web, tmp_path, monkeypatch):
    """Whatever the looks at address and name before it let pass."""
    web.file("/a.jpg", picture())
    monkeypatch.setattr("fastlt.curate.fetch.check_url", lambda url, allow_private: "127.0.0.1")
    _, found = from_urls(tmp_path, web.url("/a.jpg"), allow_private=False, retries=0)
    (row,) = found.values()
    assert row["reason"] == "a private address" and not web.asked


def test_openverse_is_asked_no_more_pages_than_it_answers(web: Web, tmp_path):
    results = [{"url": web.url("/a.jpg")}]
    web.page(
        "/v1/images/",
        lambda handler, _: handler.answer(
            200, json.dumps({"page_count": 999, "results": results}).encode()
        ),
    )
    propose(tmp_path, "liger")
    retrieved(
        tmp_path,
        sources=["openverse"],
        endpoints={"openverse": web.url("/v1/")},
        per_category=10_000,
    )
    assert web.asked["/v1/images/"] == 20


def test_a_token_goes_to_nobody_but_its_own_host(web: Web, tmp_path):
    seen = {}

    def answer(handler, times):
        seen[handler.headers["Host"]] = handler.headers["Authorization"]
        handler.answer(200, b"{}")

    web.status("/first", 302, Location=web.url("/second", "localhost"))
    web.page("/second", answer)
    web.page("/own", lambda handler, _: answer(handler, 1))

    async def ask():
        settings = CurateConfig.model_validate(
            {"retrieve": {**QUICK, "allow_private": True}}
        ).retrieve
        async with open_fetcher(settings) as fetcher:
            for path in ("/first", "/own"):
                await fetcher.get(
                    web.url(path), 1000, {"Authorization": "Bearer secret"}, is_api=True
                )

    asyncio.run(ask())
    assert seen == {f"localhost:{web.port}": None, f"127.0.0.1:{web.port}": "Bearer secret"}


# --- politeness


def test_robots_txt_is_honoured_and_asked_once(web: Web, tmp_path):
    web.file("/robots.txt", b"User-agent: *\nDisallow: /closed/\n", "text/plain")
    places = [
        web.file(f"/{folder}/{i}.jpg", picture(i))
        for i in range(3)
        for folder in ("open", "closed")
    ]
    _, found = from_urls(tmp_path, *places)
    assert all(row["fetched"] == ("/open/" in place) for place, row in found.items())
    assert {row.get("reason") for row in found.values()} == {None, "disallowed by robots.txt"}
    assert web.asked["/robots.txt"] == 1 and not any(
        path.startswith("/closed/") for path in web.asked
    )


def test_of_a_very_long_robots_txt_the_beginning_counts(web: Web, tmp_path):
    web.file(
        "/robots.txt", b"User-agent: *\nDisallow: /closed/\n" + b"# ...\n" * 200_000, "text/plain"
    )
    places = [web.file(f"/{folder}/a.jpg", picture()) for folder in ("open", "closed")]
    _, found = from_urls(tmp_path, *places)
    assert [found[place].get("reason") for place in places] == [None, "disallowed by robots.txt"]


def test_without_a_readable_robots_txt_nothing_is_asked_but_later_again(web: Web, tmp_path):
    web.status("/robots.txt", 500)
    place = web.file("/a.jpg", picture())
    _, found = from_urls(tmp_path, place)
    assert found[place]["reason"] == "its robots.txt cannot be read" and not web.asked["/a.jpg"]
    web.status("/robots.txt", 404)
    _, found = from_urls(tmp_path, place)
    assert found[place]["fetched"]


def test_a_busy_host_is_left_alone_for_as_long_as_it_asks(web: Web, tmp_path):
    def busy(handler, times):
        handler.answer(429, b"", {"Retry-After": "1"}) if times == 1 else handler.answer(
            200, picture()
        )

    place = web.page("/busy.jpg", busy)
    _, found = from_urls(tmp_path, place)
    first, second = web.times["/busy.jpg"]
    assert found[place]["fetched"] and second - first >= 0.99


def test_what_may_work_later_is_tried_again_and_the_rest_is_not(web: Web, tmp_path):
    good, gone = web.file("/good.jpg", picture()), web.url("/gone.jpg")
    broken = web.status("/broken.jpg", 503)
    silent = "http://127.0.0.1:9/closed.jpg"
    _, found = from_urls(tmp_path, good, gone, broken, silent)
    assert [found[place].get("reason") for place in (good, gone, broken)] == [
        None,
        "HTTP 404",
        "HTTP 503",
    ]
    assert found[silent]["transient"] and web.asked["/broken.jpg"] == 2  # QUICK: once more
    web.file("/broken.jpg", picture(1))
    _, found = from_urls(tmp_path, good, gone, broken, silent)
    assert found[broken]["fetched"] and web.asked["/good.jpg"] == 1 and web.asked["/gone.jpg"] == 1
    assert len(list((tmp_path / "raw").glob("*.tar"))) == 2


def test_what_is_too_slow_is_given_up(web: Web, tmp_path):
    gone = threading.Event()
    place = web.page("/slow.jpg", lambda handler, _: gone.wait(20))
    try:
        _, found = from_urls(tmp_path, place, timeout=0.3, retries=0)
    finally:
        gone.set()
    assert found[place]["reason"] == "too slow" and found[place]["transient"]


# --- sources


def test_openverse(web: Web, tmp_path):
    def page(handler, times):
        number = int(handler.path.split("page=")[1].split("&")[0])
        assert "q=liger+cat" in handler.path and "page_size=20" in handler.path
        results = [
            {
                "url": web.file(f"/{number}-{i}.jpg", picture(10 * number + i)),
                "license": "by-sa" if i else "by-nc",
                "license_version": "2.0",
                "creator": "B",
                "foreign_landing_url": "https://x.org/1",
                "title": f"T{i}",
            }
            for i in range(3)
        ]
        handler.answer(
            200, json.dumps({"page_count": 2, "results": [*results, {"url": None}, 7]}).encode()
        )

    web.page("/v1/images/", page)
    propose(tmp_path, "liger")
    (tmp_path / "categories.jsonl").write_text(
        json.dumps({"name": "liger", "query": "liger cat", "owners": ["t"]}) + "\n"
    )
    settings = {"sources": ["openverse"], "endpoints": {"openverse": web.url("/v1/")}}
    _, found = retrieved(tmp_path, **settings, licences=["CC BY-SA"])
    assert sorted(found) == [web.url(f"/{number}-{i}.jpg") for number in (1, 2) for i in (1, 2)]
    assert {(row["licence"], row["author"], row["page"]) for row in found.values()} == {
        ("by-sa 2.0", "B", "https://x.org/1")
    }
    asked = web.asked["/v1/images/"]
    retrieved(tmp_path, **settings, licences=["CC BY-SA"])
    assert web.asked["/v1/images/"] == asked == 2  # what was answered is not asked again


def test_further_pages_are_asked_where_licences_are_refused(web: Web, tmp_path):
    def openverse(handler, times):
        results = [
            {
                "url": web.file(f"/o{times}-{i}.jpg", picture(10 * times + i)),
                "license": ["nc", "cc0"][i],
            }
            for i in range(2)
        ]
        handler.answer(200, json.dumps({"page_count": 9, "results": results}).encode())

    def commons(handler, times):
        name, licence = f"/c{times}.jpg", "CC0" if times % 2 else "CC BY-NC 4.0"
        info = {
            "url": web.file(name, picture(50 + times)),
            "extmetadata": {"LicenseShortName": {"value": licence}},
        }
        pages = [{"index": 1, "title": name, "imageinfo": [info]}]
        handler.answer(
            200, json.dumps({"continue": {"gsroffset": times}, "query": {"pages": pages}}).encode()
        )

    web.page("/v1/images/", openverse)
    web.page("/w/api.php", commons)
    propose(tmp_path, "liger")
    for source, place, times in (("openverse", "/v1/", 3), ("commons", "/w/api.php", 5)):
        settings = {
            "sources": [source],
            "endpoints": {source: web.url(place)},
            "licences": ["cc0"],
            "per_category": 3,
        }
        _, found = retrieved(tmp_path, **settings)
        mine = [row["licence"].lower() for row in found.values() if row["source"] == source]
        assert (
            mine == ["cc0"] * 3
            and web.asked[place + ("images/" if source == "openverse" else "")] == times
        )


def test_commons(web: Web, tmp_path):
    def page(handler, times):
        assert "gsrsearch=filetype:bitmap+liger" in handler.path and (
            "gsroffset=2" in handler.path
        ) == (times == 2)
        info = {
            "thumburl": web.file(f"/{times}.jpg", picture(times)),
            "url": "https://x.org/original.tif",
            "descriptionurl": "https://x.org/File:a",
            "extmetadata": {
                "LicenseShortName": {"value": "CC BY-SA 4.0"},
                "Artist": {"value": '<a href="//x">C &amp; D</a>'},
            },
        }
        answer = {
            "query": {
                "pages": [
                    {"index": 1, "title": "File:a", "imageinfo": [info]},
                    {"index": 2, "title": "no info"},
                ]
            }
        }
        handler.answer(
            200,
            json.dumps(answer | ({"continue": {"gsroffset": 2}} if times == 1 else {})).encode(),
        )

    web.page("/w/api.php", page)
    propose(tmp_path, "liger")
    _, found = retrieved(
        tmp_path, sources=["commons"], endpoints={"commons": web.url("/w/api.php")}
    )
    assert len(found) == 2 and all(row["fetched"] for row in found.values())
    row = found[web.url("/1.jpg")]
    assert (row["licence"], row["author"], row["title"], row["page"]) == (
        "CC BY-SA 4.0",
        "C & D",
        "File:a",
        "https://x.org/File:a",
    )


def test_inaturalist(web: Web, tmp_path):
    def photo(number):
        web.file(f"/photos/{number}/medium.jpg", picture(number))
        return {
            "id": number,
            "url": web.url(f"/photos/{number}/square.jpg"),
            "license_code": "cc-by",
            "attribution": "(c) E",
        }

    def send(handler, value):
        handler.answer(200, json.dumps({"results": value}).encode())

    web.page(
        "/v1/taxa",
        lambda handler, _: send(handler, [{"id": 42}] if "q=liger" in handler.path else []),
    )
    web.page(
        "/v1/taxa/42",
        lambda handler, _: send(
            handler, [{"taxon_photos": [{"photo": photo(1)}, {"photo": photo(2)}]}]
        ),
    )
    web.page(
        "/v1/observations",
        lambda handler, times: send(
            handler, [{"photos": [photo(2), photo(2 + times)]}] if times < 3 else []
        ),
    )
    propose(tmp_path, "liger", "unknown thing")
    said, found = retrieved(
        tmp_path, sources=["inaturalist"], endpoints={"inaturalist": web.url("/v1/")}
    )
    assert sorted(found) == [web.url(f"/photos/{i}/medium.jpg") for i in (1, 2, 3, 4)]
    assert found[web.url("/photos/1/medium.jpg")]["page"] == "https://www.inaturalist.org/photos/1"
    assert "4 images of 1 categories" in said and "1 have none" in said


@pytest.mark.parametrize(
    "answer", [b"<html>", b"[1, 2]", b'{"results": "none"}', b'{"results": [{"url": 5}]}', b"{}"]
)
def test_an_interface_that_answers_otherwise_is_no_crash(web: Web, tmp_path, answer):
    web.file("/v1/images/", answer, "application/json")
    propose(tmp_path, "liger")
    with pytest.raises(UserError, match="no source knows an image of any category"):
        retrieved(tmp_path, sources=["openverse"], endpoints={"openverse": web.url("/v1/")})


def test_sources_are_asked_in_turn_until_there_are_enough(web: Web, tmp_path):
    folder = tmp_path / "mine/Ligers"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(picture(i))
    (folder / "notes.txt").write_text("no image")
    web.status("/v1/images/", 500)
    propose(tmp_path, "liger")
    settings = {
        "folder": str(tmp_path / "mine"),
        "endpoints": {"openverse": web.url("/v1/")},
        "retries": 0,
    }
    _, found = retrieved(tmp_path, sources=["folder", "openverse"], per_category=2, **settings)
    assert (
        sorted(found) == [str(folder / "0.jpg"), str(folder / "1.jpg")]
        and not web.asked["/v1/images/"]
    )
    said, found = retrieved(tmp_path, sources=["openverse", "folder"], per_category=9, **settings)
    assert (
        "no answer for 1 categories from openverse: HTTP 500; the same command asks again" in said
        and len(found) == 3
    )
    assert all(
        fetched_bytes(tmp_path, row) == picture(int(place[-5])) for place, row in found.items()
    )


def test_a_clip_index(web: Web, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="no pyarrow here: it comes with the extra `curate`"
    )
    pa = pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    text = rng.normal(size=(2, 16)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    images = rng.normal(size=(60, 16)).astype(np.float32)
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    index = tmp_path / "index"
    (index / "img_emb").mkdir(parents=True)
    (index / "metadata").mkdir()
    urls = [web.file(f"/{i}.jpg", picture(i)) for i in range(60)]
    for part, (start, end) in enumerate([(0, 25), (25, 60)]):
        np.save(index / f"img_emb/img_emb_{part}.npy", images[start:end].astype(np.float16))
        parquet.write_table(
            pa.table(
                {"url": urls[start:end], "caption": [f"image {i}" for i in range(start, end)]}
            ),
            index / f"metadata/metadata_{part}.parquet",
        )
    np.savez(tmp_path / "text.npz", names=["liger", "tiglon"], clip=text)
    propose(tmp_path, "liger", "tiglon", "not in the file")
    settings = {"clip_index": str(index), "clip_text": str(tmp_path / "text.npz")}
    retrieved(tmp_path, sources=["clip"], per_category=5, **settings)
    for number, name in enumerate(["liger", "tiglon"]):
        scores = images.astype(np.float16).astype(np.float32) @ text[number]
        found = [row["place"] for row in rows(tmp_path) if row["category"] == name]
        assert sorted(found) == sorted(urls[i] for i in np.argsort(-scores)[:5])


def test_a_parquet_of_urls(web: Web, tmp_path):
    parquet = pytest.importorskip(
        "pyarrow.parquet", reason="no pyarrow here: it comes with the extra `curate`"
    )
    pa = pytest.importorskip("pyarrow")
    place = web.file("/a.jpg", picture())
    parquet.write_table(
        pa.table({"category": ["liger", "liger"], "url": [place, None], "licence": ["cc0", None]}),
        tmp_path / "u.parquet",
    )
    propose(tmp_path, "liger")
    _, found = retrieved(tmp_path, sources=["urls"], urls=str(tmp_path / "u.parquet"))
    assert list(found) == [place] and found[place]["licence"] == "cc0"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sources": ["urls"]}, "needs retrieve.urls"),
        ({"sources": ["folder"]}, "needs retrieve.folder"),
        ({"sources": ["clip"]}, "needs retrieve.clip_index"),
        ({"sources": ["urls"], "urls": "nowhere.csv"}, "cannot read nowhere.csv"),
    ],
)
def test_what_a_source_lacks_is_named(tmp_path, settings, said):
    propose(tmp_path, "liger")
    with pytest.raises(UserError, match=said):
        retrieved(tmp_path, **settings)


def test_a_missing_library_is_named_with_its_extra(tmp_path):
    propose(tmp_path, "liger")
    code = (
        "import sys; sys.modules['aiohttp'] = None; sys.argv = ['fastlt', 'curate', 'retrieve', "
        "'--out', sys.argv[1]]; "
        "from fastlt.__main__ import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert (
        ended.returncode == 2
        and "pip install fastlt[curate]" in ended.stderr
        and "Traceback" not in ended.stderr
    )


def test_before_proposing_there_is_nothing_to_retrieve(tmp_path):
    with pytest.raises(UserError, match="make it with `fastlt curate propose`"):
        retrieved(tmp_path)


# --- going on


def test_a_killed_retrieval_goes_on_and_nothing_is_lost_or_fetched_twice(web: Web, tmp_path):
    def slowly(handler, times):
        time.sleep(0.02)
        handler.answer(200, picture(int(handler.path[1:-4])))

    places = [web.page(f"/{i}.jpg", slowly) for i in range(60)]
    propose(tmp_path, "liger")
    (tmp_path / "urls.csv").write_text(
        "category,url\n" + "".join(f"liger,{place}\n" for place in places)
    )
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "curate",
        "retrieve",
        "--out",
        str(tmp_path),
        "--allow-private",
        "retrieve.sources=['urls']",
        f"retrieve.urls={tmp_path}/urls.csv",
        "retrieve.per_host=100",
        "retrieve.shard=10",
        "retrieve.concurrency=4",
    ]
    for kills in range(1, 3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while len(list((tmp_path / "raw").glob("*.jsonl"))) < kills:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    whole = {path.name for path in (tmp_path / "raw").glob("*.jsonl")}
    kept = {row["place"] for row in rows(tmp_path)}
    assert 2 <= len(whole) < 6
    before = web.asked.copy()
    assert sum(before[path] for path in before if path.endswith(".jpg")) <= 60
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "60 images of 1 categories" in ended.stdout
    found = rows(tmp_path)
    assert sorted(row["place"] for row in found) == sorted(places)
    assert all(
        fetched_bytes(tmp_path, row) == picture(int(row["place"].split("/")[-1][:-4]))
        for row in found
    )
    for place in kept:  # what was whole was not fetched again
        path = place.removeprefix(web.url(""))
        assert web.asked[path] == before[path]
    assert not list((tmp_path / "raw").glob(".*.partial"))
    # Each kill costs what was under way, and what was not yet on the disk; not the group.
    assert sum(times for path, times in web.asked.items() if path.endswith(".jpg")) <= 60 + 2 * 8


def slow_command(web, tmp_path, images=60, gate=None):
    """gate: an event that answers wait for, once ten were given."""

    def slowly(handler, times):
        time.sleep(0.02)
        if gate is not None and sum(web.asked.values()) > 10:
            gate.wait(60)
        handler.answer(200, picture(int(handler.path[1:-4])))

    places = [web.page(f"/{i}.jpg", slowly) for i in range(images)]
    propose(tmp_path, "liger")
    (tmp_path / "urls.csv").write_text(
        "category,url\n" + "".join(f"liger,{place}\n" for place in places)
    )
    return [
        sys.executable,
        "-m",
        "fastlt",
        "curate",
        "retrieve",
        "--out",
        str(tmp_path),
        "--allow-private",
        "retrieve.sources=['urls']",
        f"retrieve.urls={tmp_path}/urls.csv",
        "retrieve.per_host=30",
        "retrieve.concurrency=4",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_fetched_when_it_was_stopped_is_kept(web: Web, tmp_path, number):
    gate = threading.Event()
    process = subprocess.Popen(
        slow_command(web, tmp_path, gate=gate),
        stdout=subprocess.PIPE,
        text=True,
        # where the tests run in the background, a shell has told them to ignore Ctrl-C
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while sum(web.asked.values()) < 10:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(UserError, match="another step is at work in"):
        retrieved(tmp_path, sources=["urls"], urls=f"{tmp_path}/urls.csv")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    gate.set()
    kept = rows(tmp_path)
    assert process.returncode == 0 and f"stopped: {len(kept)} images are in" in " ".join(
        said.split()
    )
    assert 3 < len(kept) < 60 and all(
        fetched_bytes(tmp_path, row) == picture(int(row["place"].split("/")[-1][:-4]))
        for row in kept
    )


def test_a_shard_that_is_damaged_or_gone_is_fetched_again(web: Web, tmp_path):
    places = [web.file(f"/{i}.jpg", picture(i)) for i in range(6)]
    from_urls(tmp_path, *places, shard=2)
    (tmp_path / "raw/000001.tar").write_bytes((tmp_path / "raw/000001.tar").read_bytes()[:700])
    (tmp_path / "raw/000002.tar").unlink()
    said, found = from_urls(tmp_path, *places, shard=2)
    assert (
        said.count("its 2 images are fetched again") == 2
        and sum(web.asked[f"/{i}.jpg"] for i in range(6)) == 10
    )
    assert all(
        fetched_bytes(tmp_path, row) == picture(int(row["place"].split("/")[-1][:-4]))
        for row in found.values()
    )


def test_licences_are_chosen_before_candidates_are_cut(web: Web, tmp_path):
    places = [web.file(f"/{i}.jpg", picture(i)) for i in range(8)]
    propose(tmp_path, "liger")
    (tmp_path / "u.csv").write_text(
        "category,url,License,Creator\n"
        + "".join(
            f"liger,{place},{'BY-NC' if i < 5 else 'CC0'},A\n" for i, place in enumerate(places)
        )
    )
    _, found = retrieved(
        tmp_path, sources=["urls"], urls=f"{tmp_path}/u.csv", licences=["cc0"], per_category=3
    )
    assert sorted(found) == sorted(places[5:]) and {
        (row["licence"], row["author"]) for row in found.values()
    } == {("CC0", "A")}
    with pytest.raises(
        UserError, match="knows an image of any category with one of the licences pdm"
    ):
        retrieved(
            tmp_path / "other" if propose(tmp_path / "other", "liger") is None else tmp_path,
            sources=["urls"],
            urls=f"{tmp_path}/u.csv",
            licences=["pdm"],
        )


def test_a_clip_index_of_others_opens_no_file_here(web: Web, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    index = tmp_path / "index"
    (index / "img_emb").mkdir(parents=True)
    (index / "metadata").mkdir()
    for name in ("own", "other"):
        (tmp_path / f"{name}.jpg").write_bytes(picture())
    vectors = np.eye(3, 4, dtype=np.float16)
    np.save(index / "img_emb/img_emb_0.npy", vectors)
    told = {
        "url": [str(tmp_path / "own.jpg"), "", None],
        "image_path": ["", str(tmp_path / "other.jpg"), ""],
        "LICENSE": ["CC0", "by", ""],
    }
    parquet.write_table(pa.table(told), index / "metadata/metadata_0.parquet")
    np.savez(tmp_path / "text.npz", names=["liger"], clip=np.ones((1, 4), np.float32) / 2)
    propose(tmp_path, "liger")
    settings = {
        "sources": ["clip"],
        "clip_index": str(index),
        "clip_text": str(tmp_path / "text.npz"),
    }
    retrieved(tmp_path, **settings)
    found = {row["licence"]: row for row in rows(tmp_path)}
    assert (
        found["by"]["fetched"]
        and "neither http nor https" in found["CC0"]["reason"]
        and len(found) == 2
    )
    with pytest.raises(
        UserError, match="knows an image of any category with one of the licences pdm"
    ):
        shutil.rmtree(tmp_path / "raw")
        retrieved(tmp_path, **settings, licences=["pdm"])
    (index / "metadata/metadata_0.parquet").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"cannot read .*metadata_0\.parquet"):
        retrieved(tmp_path, **settings)
    (index / "img_emb/img_emb_0.npy").write_bytes(
        (index / "img_emb/img_emb_0.npy").read_bytes()[:140]
    )
    with pytest.raises(UserError, match=r"cannot read .*img_emb_0\.npy"):
        retrieved(tmp_path, **settings)
