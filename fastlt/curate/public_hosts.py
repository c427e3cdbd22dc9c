"""The addresses of the network that may be asked.

None of this machine is, nor of the network behind it. A name is resolved here, and the connection
goes to the very addresses that were checked.
"""

import ipaddress
import socket

from aiohttp import AddrInfoType, ThreadedResolver
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

# IPv4 inside IPv6: NAT64 (RFC 6052, RFC 8215), and what was once meant by ::a.b.c.d
WITH_IPV4 = [
    ipaddress.ip_network(network) for network in ("64:ff9b::/96", "64:ff9b:1::/48", "::/96")
]


class Forbidden(Exception):
    """An address that may not be asked; the message is the reason."""


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the open internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = any(ip in network for network in WITH_IPV4)
        inner = (
            ip.ipv4_mapped
            or ip.sixtofour
            or (ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if embedded else None)
        )
        if inner is not None:
            return is_public(str(inner))
    return ip.is_global and not ip.is_multicast


def check_url(url: str, allow_private: bool) -> str:
    """Return the host of a URL, as the connection is made to it: 127。0。0。1 is 127.0.0.1.

    Raises Forbidden for other schemes, credentials, and private addresses that stand in it.
    """
    try:
        parts = URL(url)
        host = parts.raw_host
    except ValueError as error:
        raise Forbidden("not a valid address") from error
    if parts.scheme not in ("http", "https"):
        raise Forbidden("neither http nor https")
    if not host:
        raise Forbidden("not a valid address")
    if parts.user is not None or parts.password is not None:
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
    """A resolver of names to public addresses.

    aiohttp asks it for every name, before each connection, but not for addresses as such.
    """

    def __init__(self) -> None:
        self._inner = ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the public addresses of a host. Raises Forbidden where it has others."""
        found = await self._inner.resolve(host, port, family)
        if not all(is_public(result["host"]) for result in found):
            raise Forbidden("a private address")
        return found

    async def close(self) -> None:
        """Close the resolver behind this one."""
        await self._inner.close()


def public_socket(info: AddrInfoType) -> socket.socket:
    """Return a socket to an address, checked once more, however it was come by."""
    family, kind, protocol, _, address = info
    if not is_public(str(address[0])):
        raise Forbidden("a private address")
    return socket.socket(family, kind, protocol)
