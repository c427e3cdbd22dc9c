"""What is owed to the hosts that are asked: a rate, their robots.txt, and their word on machine learning."""

import asyncio
import re
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import urlsplit
from urllib.robotparser import RobotFileParser

AGENT = "fastlt"
OPT_OUTS = {"noai", "noimageai"}  # of X-Robots-Tag
MOST_DELAY = 30.0  # seconds that a robots.txt may ask for between two requests


class Rates:
    """When the next request to a host may go out."""

    def __init__(self, per_second: float) -> None:
        self.interval: defaultdict[str, float] = defaultdict(lambda: 1 / per_second)
        self._next: dict[str, float] = {}

    async def turn(self, host: str) -> None:
        now = asyncio.get_running_loop().time()
        at = max(now, self._next.get(host, now))
        self._next[host] = at + self.interval[host]
        await asyncio.sleep(at - now)

    def pause(self, host: str, seconds: float) -> None:
        """As the host asked."""
        later = asyncio.get_running_loop().time() + seconds
        self._next[host] = max(later, self._next.get(host, later))


class Robots:
    """robots.txt of each origin, read once (RFC 9309: none there means all is allowed, one that cannot be read that nothing is).

    read: an address to (status, text). What it raises is raised; what could not be read is read again the next time.
    """

    def __init__(self, read: Callable[[str], Awaitable[tuple[int, str]]], rates: Rates) -> None:
        self._read, self._rates = read, rates
        self._origins: dict[str, asyncio.Task[RobotFileParser | None]] = {}

    async def allow(self, url: str) -> bool | None:
        """None: not known, as robots.txt could not be read."""
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
        return None if rules is None else rules.can_fetch(AGENT, url)

    async def _rules(self, origin: str, host: str) -> RobotFileParser | None:
        status, text = await self._read(f"{origin}/robots.txt")
        if status != 200 and not 400 <= status < 500:
            return None
        rules = RobotFileParser()
        rules.parse(text.splitlines() if status == 200 else [])
        if delay := rules.crawl_delay(AGENT):
            self._rates.interval[host] = max(self._rates.interval[host], min(float(delay), MOST_DELAY))
        return rules


def opted_out(tags: Iterable[str]) -> bool:
    """tags: values of X-Robots-Tag, each `rule, rule` or `agent: rule, rule`."""
    for tag in tags:
        agent, colon, rules = tag.partition(":")
        if colon and re.fullmatch(r"[\w.*-]+", agent.strip()) and agent.strip().lower() not in (AGENT, "*"):
            continue
        words = {word.strip().lower() for word in (rules if colon else tag).split(",")}
        if words & OPT_OUTS:
            return True
    return False
