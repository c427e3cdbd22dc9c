"""The limits of hosts: a rate, and their robots.txt."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from protego import Protego

from fastlt.curate.opt_outs import AGENT

MOST_DELAY = 30.0  # seconds that a robots.txt may ask for between two requests


class Rates:
    """The time at which the next request to each host may go out."""

    def __init__(self, per_second: float) -> None:
        self.interval: defaultdict[str, float] = defaultdict(lambda: 1 / per_second)
        self._next: dict[str, float] = {}
        self._one_at_a_time: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def turn(self, host: str) -> None:
        """Wait for the turn of a request.

        Turns come one after the other, so that a pause is kept by all that wait.
        """
        loop = asyncio.get_running_loop()
        async with self._one_at_a_time[host]:
            while (early := self._next.get(host, 0.0) - loop.time()) > 0:
                await asyncio.sleep(early)
            self._next[host] = loop.time() + self.interval[host]

    def pause(self, host: str, seconds: float) -> None:
        """Let no request to a host go out for some seconds, as it asked."""
        later = asyncio.get_running_loop().time() + seconds
        self._next[host] = max(later, self._next.get(host, later))


class Robots:
    """The robots.txt of each origin, read once.

    By RFC 9309 none there means that all is allowed, one that cannot be read that nothing is.

    read: an address to (status, text). What it raises is raised; what could not be read is read
    again the next time.
    """

    def __init__(self, read: Callable[[str], Awaitable[tuple[int, str]]], rates: Rates) -> None:
        self._read, self._rates = read, rates
        self._origins: dict[str, asyncio.Task[Protego | None]] = {}

    async def allow(self, url: str) -> bool | None:
        """Return whether an address may be fetched; None where robots.txt could not be read."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin not in self._origins:
            self._origins[origin] = asyncio.create_task(self._rules(origin, parts.hostname or ""))
        rules = None
        try:
            rules = await self._origins[origin]
        finally:
            if rules is None:
                self._origins.pop(origin, None)
        return None if rules is None else rules.can_fetch(url, AGENT)

    async def _rules(self, origin: str, host: str) -> Protego | None:
        status, text = await self._read(f"{origin}/robots.txt")
        if status != 200 and not 400 <= status < 500:
            return None
        try:
            rules = Protego.parse(text if status == 200 else "")
        except ValueError:
            return None
        if delay := rules.crawl_delay(AGENT):
            self._rates.interval[host] = max(
                self._rates.interval[host], min(float(delay), MOST_DELAY)
            )
        return rules
