"""robots.txt and rates."""

import asyncio

import pytest

from fastlt.curate.rate_limits import MOST_DELAY, Rates, Robots


def allowed(status, text, *urls):
    asked = []

    async def read(url):
        asked.append(url)
        return status, text

    async def ask():
        rates = Rates(1000)
        robots = Robots(read, rates)
        return await asyncio.gather(*(robots.allow(url) for url in urls)), rates

    found, rates = asyncio.run(ask())
    return found, asked, rates


def test_robots_txt_is_read_once_for_an_origin():
    text = (
        "User-agent: *\nDisallow: /private\n\nUser-agent: fastlt\nDisallow: /data\nCrawl-delay: 2\n"
    )
    found, asked, rates = allowed(
        200,
        text,
        "https://a.org/data/1.jpg",
        "https://a.org/private/1.jpg",
        "https://b.org:81/data/x",
    )
    assert found == [False, True, False]  # our own section counts
    assert asked == ["https://a.org/robots.txt", "https://b.org:81/robots.txt"]
    assert rates.interval["a.org"] == 2
    _, _, rates = allowed(200, "User-agent: *\nCrawl-delay: 9999\n", "https://a.org/1")
    assert rates.interval["a.org"] == MOST_DELAY


@pytest.mark.parametrize(("status", "answer"), [(404, True), (403, True), (500, None), (503, None)])
def test_none_there_allows_and_one_that_cannot_be_read_does_not(status, answer):
    assert allowed(status, "Disallow: /", "https://a.org/x")[0] == [answer]


def test_turns_keep_the_rate_of_each_host():
    async def turns():
        rates, loop = Rates(50), asyncio.get_running_loop()
        began = loop.time()

        async def turn(host):
            await rates.turn(host)
            return loop.time() - began

        first = await asyncio.gather(*(turn(host) for host in ("a", "b", "a", "a", "b")))
        rates.pause("a", 0.2)
        before = loop.time()
        await rates.turn("a")
        return first, loop.time() - before

    first, paused = asyncio.run(turns())
    for took, least in zip(first, (0, 0, 0.02, 0.04, 0.02), strict=True):
        assert took >= least - 1e-3
    assert paused >= 0.2 - 1e-3


@pytest.mark.parametrize(
    ("text", "path", "answer"),
    [
        ("User-agent: *\nDisallow: /*.jpg$\n", "/a.jpg", False),
        ("User-agent: *\nDisallow: /*.jpg$\n", "/a.jpg.html", True),
        ("User-agent: *\nAllow: /\nDisallow: /private/\n", "/private/a.jpg", False),
        ("User-agent: *\nDisallow: /\nAllow: /open/\n", "/open/a.jpg", True),
        ("User-agent: *\nDisallow: //[x\n", "/a.jpg", True),
        ("User-agent: *\nCrawl-delay: \u00b2\n", "/a.jpg", True),
    ],
)
def test_robots_txt_is_read_as_rfc_9309_says(text, path, answer):
    assert allowed(200, text, f"https://a.org{path}")[0] == [answer]


def test_a_pause_is_kept_by_those_that_wait_already():
    async def turns():
        rates, loop = Rates(1000), asyncio.get_running_loop()

        async def turn(number):
            await rates.turn("a")
            if number == 0:
                rates.pause("a", 0.3)
            return loop.time()

        return await asyncio.gather(*map(turn, range(4)))

    first, *others = asyncio.run(turns())
    assert all(later - first >= 0.299 for later in others)
