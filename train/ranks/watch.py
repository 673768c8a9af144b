"""A TCP connection of every rank to rank 0: it closes when a process ends, however that ends."""

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from ...conf.runtime.rank_info import RankInfo

MEETING_S = 300.0  # for all ranks to start; a rank that ends before says nothing to the others
GRACE_S = 5.0  # for a rank to end by its own error, which tells more, before it ends because another has


class Watch(threading.Thread):
    """Notices the end of other ranks; ends this process too, unless it does so itself within some seconds."""

    def __init__(self, place: RankInfo, gather: Callable[[Any], list[Any]]) -> None:
        super().__init__(name="watch", daemon=True)
        self.leaving = False  # set before the ranks part: an end is then none of its business
        self.ended: list[int] = []  # ranks that have ended; if rank 0 has, it alone
        self.noticed = threading.Event()  # set once `ended` is filled
        self.ending = threading.Lock()  # held by the thread that ends this process
        self._rank = place.rank
        self._peers = _connect(place, gather) if place.rank else _accept(place, gather)
        self.start()

    def run(self) -> None:
        """Wait until a connection closes, or rank 0 says which have."""
        wait(self._peers.values())
        if self._rank == 0:
            time.sleep(0.2)  # ranks of one node end together
            ready = wait(self._peers.values())
            self.ended = sorted(rank for rank, peer in self._peers.items() if peer in ready)
            for rank in self._peers.keys() - self.ended:
                _send(self._peers[rank], json.dumps(self.ended))
        else:
            self.ended = json.loads(_receive(self._peers[0]) or "[0]")
        self.noticed.set()
        time.sleep(GRACE_S)
        if self.leaving or not self.ending.acquire(blocking=False):
            return
        print(f"fledge: error: rank {self._rank}: {ended_message(self.ended)}", file=sys.stderr, flush=True)
        os._exit(1)


def ended_message(ended: list[int], text: str = "") -> str:
    """Return which ranks have ended and what to do."""
    names = f"rank{'s' * (len(ended) > 1)} {', '.join(map(str, ended))}" if ended else "another rank"
    return (
        f"{names} ended: see the log there for the cause; start the same command again, training goes on from the "
        "newest checkpoint" + (f" ({text})" if text else "")
    )


def _accept(place: RankInfo, gather: Callable[[Any], list[Any]]) -> dict[int, socket.socket]:
    """Connect rank 0 with all others. They give a token, and a stranger who finds the port cannot."""
    token, ipv6 = secrets.token_hex(16), socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    peers: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), family=family, backlog=place.world, dualstack_ipv6=ipv6) as server:
        server.settimeout(MEETING_S)
        gather((server.getsockname()[1], token))
        while len(peers) < place.world - 1:
            peer, _ = server.accept()
            peer.settimeout(MEETING_S)
            peer_token, _, rank = _receive(peer).partition(" ")
            if secrets.compare_digest(peer_token.encode(), token.encode()):
                peers[int(rank)] = _keep_alive(peer)
            else:
                peer.close()
    return peers


def _connect(place: RankInfo, gather: Callable[[Any], list[Any]]) -> dict[int, socket.socket]:
    (port, token), *_ = gather(None)
    peer = socket.create_connection((place.address, port), timeout=MEETING_S)
    _send(peer, f"{token} {place.rank}")
    return {0: _keep_alive(peer)}


def _keep_alive(peer: socket.socket) -> socket.socket:
    """Have the system ask a silent other end whether it is there: a node that lost power does not say that it ends."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    return peer


def _send(peer: socket.socket, line: str) -> None:
    with suppress(OSError):  # it has ended as well, and knows
        peer.sendall(f"{line}\n".encode())


def _receive(peer: socket.socket) -> str:
    """Read one line; nothing if the other end has closed, which a killed process may do by a reset."""
    with suppress(OSError), peer.makefile(errors="replace") as file:
        line = file.readline()
        return line.strip() if line.endswith("\n") else ""
    return ""
