"""What stands at an address that data name, within bounds: data of others choose no file or host of this network."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass, url2pathname, urlopen

import aiohttp

MOST_MIB = 64
TIMEOUT_S = 60.0  # of fetching one, in all
_CURE = "if that is meant, allow it with data.local_images=true"


def check_foreign(address: str) -> None:
    """Refuse an address in data of the hub that leads to this machine or its network, as far as its words tell.

    Raises:
        ValueError: it does, to be put after where it stands.
    """
    if not _is_url(address):
        raise ValueError(f"names the file {address[:80]!r}, which data that are not on this machine may not: {_CURE}")
    host = urlsplit(address).hostname or ""
    if address.startswith("http") and (host == "localhost" or _is_inside(host)):
        raise ValueError(f"names {address[:80]!r}, which is in the network of this machine: {_CURE}")


def read_address(address: str, local: bool = False) -> bytes:
    """Read what stands at a path, or a `file:`, `data:`, `http:` or `https:` URL.

    Args:
        local: fetch from hosts of this machine's network too.

    Raises:
        ValueError: it is too large, takes too long, or is in this machine's network.
        OSError, aiohttp.ClientError: it cannot be had.
    """
    if address.startswith("http") and _is_url(address):
        return asyncio.run(_fetch(address, local))
    if address.startswith("file://"):
        address = url2pathname(address.removeprefix("file://").removeprefix("localhost"))
    with urlopen(address) if address.startswith("data:") else open(Path(address), "rb") as file:
        content: bytes = file.read(MOST_MIB * 2**20 + 1)
    _check_size(content)
    return content


def _is_url(address: str) -> bool:
    return re.match("(https?|data):", address) is not None


def _check_size(content: bytes | bytearray) -> None:
    if len(content) > MOST_MIB * 2**20:
        raise ValueError(f"it is larger than {MOST_MIB} MiB")


async def _fetch(url: str, local: bool) -> bytes:
    parts = urlsplit(url)
    proxied = parts.scheme in getproxies() and not proxy_bypass(parts.netloc)  # then the proxy is who connects
    if not local:
        check_foreign(url)
    connector = aiohttp.TCPConnector(socket_factory=None if local or proxied else _open_outside)
    timeout, headers = aiohttp.ClientTimeout(total=TIMEOUT_S), {"User-Agent": "fledge"}
    content = bytearray()
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, trust_env=True) as session,
            session.get(url, raise_for_status=True) as response,
        ):
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                _check_size(content)
    except TimeoutError:
        raise ValueError(f"it has not come within {TIMEOUT_S:.0f} s") from None
    return bytes(content)


def _open_outside(info: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a connection, of redirected ones too: the place where the host's true address is known."""
    family, kind, protocol, _, place = info
    if _is_inside(str(place[0])):
        raise ValueError(f"its host {place[0]} is in the network of this machine: {_CURE}")
    return socket.socket(family, kind, protocol)


def _is_inside(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False  # a name
    return not (getattr(address, "ipv4_mapped", None) or address).is_global
