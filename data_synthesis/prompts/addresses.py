"""Reads what stands at an address in data, within bounds: data of others choose no file or host of this network."""

import asyncio
import ipaddress
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, url2pathname, urlopen

import aiohttp

MOST_MIB = 64
TIMEOUT_S = 60.0  # of fetching one, in all
_INSIDE = "is in this machine's network; set data.local_images=true to allow that"


def check_foreign(address: str, files: bool = False, hosts: bool = False) -> None:
    """Raise ValueError, to be put after the row's place, if an address by its words leads to this machine's network.

    `files` and `hosts` allow those of this machine and its network.
    """
    scheme = scheme_of(address)
    if not files and scheme in ("", "file"):
        what = f"refers to the local file {address[:80]!r}"
        raise ValueError(f"{what}; data from the hub may not, unless data.local_images=true")
    if not hosts and scheme.startswith("http") and _is_inside(urlsplit(address).hostname or ""):
        raise ValueError(f"refers to {address[:80]!r}: its host {_INSIDE}")


def read_address(address: str, local: bool = False) -> bytes:
    """Read what stands at a path, or a `file:`, `data:`, `http:` or `https:` URL; `local` allows this network's hosts.

    Raises ValueError if it is too large, too slow or in this machine's network, OSError or aiohttp.ClientError if it
    cannot be had.
    """
    scheme = scheme_of(address)
    if scheme.startswith("http"):
        return asyncio.run(_fetch(address, local))
    if scheme == "file":
        address = url2pathname(address[len("file://") :].removeprefix("localhost"))
    with urlopen(address) if scheme == "data" else open(Path(address), "rb") as file:
        content: bytes = file.read(MOST_MIB * 2**20 + 1)
    _check_size(content)
    return content


def scheme_of(address: str) -> str:
    """Return the scheme of a URL in small letters; of a path none."""
    match = re.match("(https?|data)(?=:)|file(?=://)", address, re.IGNORECASE)
    return match[0].lower() if match else ""


def _check_size(content: bytes | bytearray) -> None:
    if len(content) > MOST_MIB * 2**20:
        raise ValueError(f"it is larger than {MOST_MIB} MiB")


async def _fetch(url: str, local: bool) -> bytes:
    connector = aiohttp.TCPConnector(socket_factory=None if local else partial(_open_outside, _proxies()))
    timeout, headers = aiohttp.ClientTimeout(total=TIMEOUT_S), {"User-Agent": "fledge"}
    checks = () if local else (_ask_outside,)
    content = bytearray()
    try:
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers, trust_env=True) as session,
            session.get(url, raise_for_status=True, middlewares=checks) as response,
        ):
            async for chunk in response.content.iter_chunked(1 << 16):
                content += chunk
                _check_size(content)
    except TimeoutError:
        raise ValueError(f"it has not come within {TIMEOUT_S:.0f} s") from None
    return bytes(content)


def _proxies() -> set[tuple[Any, ...]]:
    """Return the addresses and ports of the proxies that the environment names."""
    proxies = [urlsplit(getproxies().get(scheme, "")) for scheme in ("http", "https")]
    ports = [
        (proxy.hostname, proxy.port or {"https": 443}.get(proxy.scheme, 80)) for proxy in proxies if proxy.hostname
    ]
    return {info[4][:2] for host, port in ports for info in socket.getaddrinfo(host, port)}


async def _ask_outside(request: aiohttp.ClientRequest, ask: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Refuse a request by the name of its host, redirected ones too: a proxy may reach more than this process."""
    if _is_inside(request.url.host or ""):
        raise ValueError(f"its host {request.url.host} {_INSIDE}")
    return await ask(request)


def _open_outside(proxies: set[tuple[Any, ...]], info: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a connection, of redirected ones too: the place where the host's true address is known."""
    family, kind, protocol, _, address = info
    if address[:2] not in proxies and _is_inside(str(address[0])):
        raise ValueError(f"its host {address[0]} {_INSIDE}")
    return socket.socket(family, kind, protocol)


def _is_inside(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host == "localhost"  # other names do not tell
    return not (getattr(address, "ipv4_mapped", None) or address).is_global
