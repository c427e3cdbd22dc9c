"""Which addresses of the network may be asked: none of this machine, nor of the network behind it.

A URL from the web may lead there, by itself, by a redirect, or by what its name resolves to; names are resolved here, and the
connection goes to the very addresses that were looked at.
"""

import ipaddress
import socket
from urllib.parse import urlsplit

from aiohttp import ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult

NAT64 = ipaddress.ip_network("64:ff9b::/96")  # IPv4 inside IPv6, RFC 6052


class Forbidden(Exception):
    """An address that may not be asked; the message is the reason."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def check_url(url: str, allow_private: bool) -> str:
    """The host of a URL. Raises Forbidden for other schemes, credentials, and private addresses that stand in it."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise Forbidden("not a valid address") from error
    if parts.scheme not in ("http", "https"):
        raise Forbidden("neither http nor https")
    if not host:
        raise Forbidden("not a valid address")
    if parts.username is not None or parts.password is not None:
        raise Forbidden("an address with a password")
    if not allow_private and _is_literal(host) and not is_public(host):
        raise Forbidden("a private address")
    return host


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


class PublicResolver(AbstractResolver):
    """Names to public addresses. aiohttp asks it for every name, before each connection, but not for addresses as such."""

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise Forbidden("a private address")
        return found

    async def close(self) -> None:
        await self._inner.close()
