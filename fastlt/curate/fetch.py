"""Fetching from addresses that nobody has checked: bounded in size and time, within limits.

Redirects are followed one by one, and each is checked.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import NamedTuple
from urllib.parse import urljoin

import aiohttp

from fastlt.curate.opt_outs import AGENT, opted_out, page_opts_out
from fastlt.curate.public_hosts import Forbidden, PublicResolver, check_url, public_socket
from fastlt.curate.rate_limits import Rates, Robots
from fastlt.curate.settings import RetrieveConfig

REDIRECTS = 5
ROBOTS_BYTES = 500_000  # RFC 9309 asks for as much
PAGE_BYTES = 200_000  # of a page, in which its head stands
TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
LONGEST_PAUSE = 60.0  # seconds that a host may ask for before the next try
PIECE = 64 * 1024  # bytes read at a time


class Refused(Exception):
    """A refusal to fetch, with its reason. transient: another time it may work."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.transient = reason, transient


class Fetched(NamedTuple):
    """The bytes of an answer, and where they came from."""

    data: bytes
    url: str  # after redirects


class Answer(NamedTuple):
    """The answer to one request."""

    status: int
    data: bytes
    location: str | None = None  # of a redirect, absolute
    retry_after: float = 0.0  # seconds
    opted_out: bool = False


class Fetcher:
    """A client that keeps to rates and robots.txt, and to public hosts."""

    def __init__(self, session: aiohttp.ClientSession, settings: RetrieveConfig) -> None:
        self.session, self.settings = session, settings
        self.rates = Rates(settings.per_host)
        self.robots = Robots(self._robots_text, self.rates)
        self._pages: dict[str, asyncio.Task[bool]] = {}
        self._slots = asyncio.Semaphore(settings.concurrency)

    async def get(
        self, url: str, max_bytes: int, headers: dict[str, str] | None = None, is_api: bool = False
    ) -> Fetched:
        """Return what an address answers; what may go better is tried again.

        is_api: an interface meant for programs, which robots.txt does not concern. Raises Refused.
        """
        for left in reversed(range(self.settings.retries + 1)):
            try:
                return await self._follow(url, max_bytes, headers or {}, is_api)
            except Refused as refused:
                if not (refused.transient and left):
                    raise
                await asyncio.sleep(2.0 ** (self.settings.retries - left) / 4)
        raise AssertionError("the last try returns or raises")

    async def _follow(
        self, url: str, max_bytes: int, headers: dict[str, str], is_api: bool
    ) -> Fetched:
        first = self._host(url)
        for _ in range(REDIRECTS + 1):
            host = self._host(url)
            headers = headers if host == first else {}  # a token is for whom it was given to
            if not is_api:
                await self._ask_robots(url)
            answer = await self._request(url, host, max_bytes, headers)
            if answer.opted_out and not is_api:
                raise Refused("opted out of machine learning by X-Robots-Tag")
            if answer.location is not None:
                url = answer.location
                continue
            if answer.status in TRANSIENT:
                self.rates.pause(host, min(answer.retry_after, LONGEST_PAUSE))
                raise Refused(f"HTTP {answer.status}", transient=True)
            if answer.status != 200:
                raise Refused(f"HTTP {answer.status}")
            return Fetched(answer.data, url)
        raise Refused(f"more than {REDIRECTS} redirects")

    async def page_opts_out(self, url: str) -> bool:
        """Return whether the page that shows an image asks to be left out of machine learning.

        One that cannot be read says nothing; each is read once.
        """
        if url not in self._pages:
            self._pages[url] = asyncio.create_task(self._page_opts_out(url))
        return await self._pages[url]

    async def _page_opts_out(self, url: str) -> bool:
        try:
            for _ in range(REDIRECTS + 1):
                host = self._host(url)
                await self._ask_robots(url)
                answer = await self._request(url, host, PAGE_BYTES, {}, cut=True)
                if answer.opted_out:
                    return True
                if answer.location is None:
                    return page_opts_out(answer.data.decode("utf-8", "replace"))
                url = answer.location
        except Refused:
            pass
        return False

    def _host(self, url: str) -> str:
        try:
            return check_url(url, self.settings.allow_private)
        except Forbidden as error:
            raise Refused(str(error)) from error

    async def _ask_robots(self, url: str) -> None:
        allowed = await self.robots.allow(url)
        if allowed is None:
            raise Refused("its robots.txt cannot be read", transient=True)
        if not allowed:
            raise Refused("disallowed by robots.txt")

    async def _robots_text(self, url: str) -> tuple[int, str]:
        for _ in range(REDIRECTS + 1):
            answer = await self._request(url, self._host(url), ROBOTS_BYTES, {}, cut=True)
            if answer.location is None:
                return answer.status, answer.data.decode("utf-8-sig", "replace")
            url = answer.location
        return 404, ""  # RFC 9309 takes it for none

    async def _request(
        self, url: str, host: str, max_bytes: int, headers: dict[str, str], cut: bool = False
    ) -> Answer:
        """cut: what is longer than max_bytes is not refused, but ends there."""
        await self.rates.turn(host)
        try:
            async with (
                self._slots,
                self.session.get(url, allow_redirects=False, headers=headers) as response,
            ):
                answer = self._head(response, url)
                return (
                    answer._replace(data=await body(response, max_bytes, cut))
                    if answer.status == 200
                    else answer
                )
        except Forbidden as error:
            raise Refused(str(error)) from error
        except (TimeoutError, asyncio.TimeoutError) as error:
            raise Refused("too slow", transient=True) from error
        except (aiohttp.ClientConnectorCertificateError, ssl.SSLError) as error:
            raise Refused("its certificate is not valid") from error
        except aiohttp.InvalidURL as error:
            raise Refused("not a valid address") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            if isinstance(error.__cause__, Forbidden):
                raise Refused(str(error.__cause__)) from error
            raise Refused("the connection failed", transient=True) from error

    @staticmethod
    def _head(response: aiohttp.ClientResponse, url: str) -> Answer:
        location = response.headers.get("Location") if 300 <= response.status < 400 else None
        try:
            pause = float(response.headers.get("Retry-After", 0))
        except ValueError:  # a date
            pause = LONGEST_PAUSE
        if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
            raise Refused("it is compressed, though that was not asked for")
        tags = response.headers.getall("X-Robots-Tag", [])
        return Answer(
            response.status,
            b"",
            urljoin(url, location) if location else None,
            pause,
            opted_out(tags),
        )


async def body(response: aiohttp.ClientResponse, max_bytes: int, cut: bool) -> bytes:
    """Return the body of a response.

    Raises Refused as soon as there is more than max_bytes, announced or not; with `cut` it ends
    there.
    """
    if (response.content_length or 0) > max_bytes and not cut:
        raise Refused("too many bytes")
    parts = bytearray()
    async for part in response.content.iter_chunked(PIECE):
        parts += part
        if len(parts) > max_bytes:
            if cut:
                break
            raise Refused("too many bytes")
    return bytes(parts[:max_bytes])


@asynccontextmanager
async def open_fetcher(settings: RetrieveConfig) -> AsyncIterator[Fetcher]:
    """Yield a fetcher, and close its connections afterwards."""
    connector = aiohttp.TCPConnector(
        resolver=None if settings.allow_private else PublicResolver(),
        limit=settings.concurrency,
        use_dns_cache=False,
        socket_factory=None if settings.allow_private else public_socket,
    )
    timeout = aiohttp.ClientTimeout(total=settings.timeout)
    headers = {"User-Agent": user_agent(settings.contact), "Accept-Encoding": "identity"}
    async with aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
    ) as session:
        yield Fetcher(session, settings)


def user_agent(contact: str) -> str:
    """Return the user agent that requests name, with the contact where there is one."""
    return (
        f"{AGENT}/{version('fastlt')} (images for research on long-tailed "
        f"classification{'; ' + contact if contact else ''})"
    )
