"""Which addresses may be asked."""

import asyncio

import pytest

pytest.importorskip("aiohttp", reason="no aiohttp here: it comes with the extra `curate`")
from fastlt.curate.public_hosts import Forbidden, PublicResolver, check_url, is_public


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "198.18.0.1",
        "192.0.2.1",
        "::127.0.0.1",
        "64:ff9b:1::7f00:1",
    ],
)
def test_private_ones_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"],
)
def test_public_ones_are(address):
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://example.org/a.jpg", "neither http nor https"),
        ("file:///etc/passwd", "neither http nor https"),
        ("gopher://127.0.0.1/", "neither http nor https"),
        ("https:///a.jpg", "not a valid address"),
        ("http://example.org:port/", "not a valid address"),
        ("http://[::1/", "not a valid address"),
        ("http://user:word@example.org/", "an address with a password"),
        ("http://127.0.0.1:80/", "a private address"),
        ("http://[::ffff:10.0.0.1]/", "a private address"),
        ("http://127\u30020\u30020\u30021/", "a private address"),
        ("http://\uff11\uff12\uff17.0.0.1/", "a private address"),
        ("http://\u2460\u2461\u2466.0.0.1/", "a private address"),
        ("HTTP://169.254.169.254/latest/meta-data", "a private address"),
    ],
)
def test_what_may_not_be_asked(url, reason):
    with pytest.raises(Forbidden, match=reason):
        check_url(url, allow_private=False)


def test_private_ones_may_be_allowed_but_nothing_else():
    assert check_url("http://127.0.0.1:8000/a", allow_private=True) == "127.0.0.1"
    assert check_url("https://Example.org/a", allow_private=False) == "example.org"
    with pytest.raises(Forbidden):
        check_url("file:///etc/passwd", allow_private=True)


@pytest.mark.parametrize("name", ["localhost", "127.1", "2130706433", "0x7f000001"])
def test_a_name_that_resolves_to_this_machine_is_not_resolved(name):
    async def resolve():
        resolver = PublicResolver()
        try:
            await resolver.resolve(name, 80)
        finally:
            await resolver.close()

    with pytest.raises(Forbidden, match="a private address"):
        asyncio.run(resolve())
