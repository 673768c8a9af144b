"""The processes of a training run: they meet, compare what they are about to do, and end together.

Beside the group that trains (NCCL, or gloo on the CPU) stand a gloo group for words between the ranks, and a TCP
connection of every rank to rank 0. It closes when a process ends, however it ends; rank 0 tells the others, wherever
they are waiting: NCCL does not notice a peer's end.

| a rank                      | prints                                    | exit code                             |
|-----------------------------|-------------------------------------------|---------------------------------------|
| finished                    |                                           | 0                                     |
| raised SystemExit, as all   |                                           | its code                              |
| was stopped before a step   | (conf/runtime/signals.py)                 | 75, or 130 after Ctrl-C               |
| met an error a user can fix | the sentence                              | 2                                     |
| differs from the others     | the sentence, on every rank               | 2                                     |
| met a fault                 | the traceback                             | 1                                     |
| sees that another has ended | which, and what to do                     | 1                                     |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import re
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, _world  # DeepSpeed lets no timeout through
from torch.distributed.rendezvous import rendezvous

from ... import __version__
from ...conf.errors import USER_ERRORS, explain
from ...conf.runtime.artifact import differences
from ...conf.runtime.rank_info import RankInfo, own_gpus, read_rank_info
from ...conf.runtime.signals import Stopped
from ...conf.schema import Config

_MEETING_S = 300.0  # for all ranks to start; a rank that ends before says nothing to the others
_GRACE_S = 5.0  # for a rank to end by its own error, which tells more, before it ends because another has
_PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process exited|pair closure", re.I)
_TIMED_OUT = re.compile(r"timed out|timeout", re.I)
_OF_ONE_NODE = {"dump": ("folder",), "verifier": ("path",)}  # may be copies; what they hold is compared
_PACKAGES = ("conf", "data_synthesis", "models", "train")


class Ranks:
    """The ranks of a run as one of them sees them.

    Attributes:
        place: of this process.
        gpus: that it has to itself, None without any.
        device: where it trains.
    """

    def __init__(self, place: RankInfo, gpus: range | None, timeout_s: int) -> None:
        self.place, self.gpus = place, gpus
        self.device = torch.device("cuda", gpus[0]) if gpus else torch.device("cpu")
        self.rank, self.world = place.rank, place.world
        self._timeout = timedelta(seconds=timeout_s)
        self._words = dist.new_group(backend="gloo", timeout=self._timeout) if self.world > 1 else None

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank; every rank calls it, and none waits for the GPU."""
        if self._words is None:
            return flag
        word = torch.tensor([int(flag)])
        dist.all_reduce(word, dist.ReduceOp.MAX, self._words)
        return bool(word)

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, by rank."""
        if self._words is None:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, self._words)
        return values

    def agree(self, facts: dict[str, Any]) -> None:
        """Compare JSON-able facts of all ranks.

        Raises:
            ValueError: on every rank, if any differ; it names the ranks and the dotted names.
        """
        first, *others = self.gather(json.loads(json.dumps(facts, default=str)))
        ranks: dict[str, list[str]] = {}
        for rank, theirs in enumerate(others, 1):
            if changes := differences(first, theirs):
                ranks.setdefault("; ".join(changes), []).append(str(rank))
        if ranks:
            message = ", and ".join(f"rank {', '.join(those)} from rank 0 in {what}" for what, those in ranks.items())
            raise ValueError(f"the ranks differ, {message}: start all with the same command, data and code")

    def bound_collectives(self) -> None:
        """Give every group made so far, DeepSpeed's own too, the timeout of the run."""
        for group in list(_world.pg_map):
            _set_pg_timeout(self._timeout, group)

    def check_devices(self) -> None:
        """Refuse, on every rank, two ranks on one GPU, which NCCL would only call an internal error."""
        if self.device.type != "cuda":
            return
        everyone = self.gather((socket.gethostname(), str(torch.cuda.get_device_properties(self.device).uuid)))
        for rank, gpu in enumerate(everyone):
            if (other := everyone.index(gpu)) != rank:
                raise ValueError(f"ranks {other} and {rank} are on one GPU of {gpu[0]}: start one process a GPU")


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor over all ranks, in place, and give it back."""
    dist.all_reduce(values)
    return values


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Join the other ranks, if there are any; on leaving, wait for them.

    Of several ranks each process ends here, whatever happened, with the exit code of the table above. An ordinary end
    of the interpreter would not do: gloo's threads now and then abort a process whose interpreter has shut down (2 of
    24 runs on a busy machine), and NCCL may wait for a rank that is gone.
    """
    place = read_rank_info(os.environ)
    if place.world == 1:
        yield _meet(place, config.train.collective_timeout_s)
        dist.destroy_process_group()
        return
    code, watch = 1, None
    try:
        ranks = _meet(place, config.train.collective_timeout_s)
        ranks.agree({"fledge": __version__, "source": source_digest(), **_shared(config)})
        ranks.check_devices()
        watch = Watch(ranks)
        sum_over_ranks(torch.zeros(1, device=ranks.device))  # NCCL's barriers use the GPU of a group's first collective
        code = yield from _until_all_end(ranks, watch)
    except Stopped as stopped:
        code = stopped.exit_code
    except BaseException as error:  # the process ends here
        code = _report(error, place, watch, config.train.collective_timeout_s)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _until_all_end(ranks: Ranks, watch: Watch) -> Generator[Ranks, None, int]:
    code = 0
    try:
        yield ranks
    except SystemExit as error:
        if isinstance(error, Stopped):  # the other ranks may be anywhere, and are not waited for
            raise
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    watch.leaving = True
    ranks.any_rank(False)
    return code


def _meet(place: RankInfo, timeout_s: int) -> Ranks:
    """Make the group that trains, and give this rank its device."""
    on_gpu = torch.cuda.is_available()
    num_gpus = torch.cuda.device_count() if on_gpu else 0
    gpus = own_gpus(place, num_gpus) if on_gpu else None
    os.environ.update(place.environment(num_gpus))  # DeepSpeed takes its GPU from them, and refuses another of Open MPI
    os.environ.pop("OMPI_COMM_WORLD_LOCAL_RANK", None)
    if gpus:
        torch.cuda.set_device(gpus[0])
    else:
        # Its extension would be compiled at first use, and a build killed half-way blocks every later process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    timeout = timedelta(seconds=timeout_s)
    store = dist.HashStore()
    if place.world > 1:
        meeting = min(timeout, timedelta(seconds=_MEETING_S))
        store, *_ = next(rendezvous("env://", place.rank, place.world, timeout=meeting))
        store.set_timeout(timeout)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes the group that is there
    return Ranks(place, gpus, timeout_s)


def _shared(config: Config) -> dict[str, Any]:
    """Return the options in which ranks must not differ."""
    options = dataclasses.asdict(config)
    for group, names in _OF_ONE_NODE.items():
        for name in names:
            del options[group][name]
    return options


def source_digest() -> str:
    """Hash the code that trains (16 hex digits of SHA-256)."""
    root = Path(__file__).parents[2]
    state = hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            state.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return state.hexdigest()[:16]


class Watch(threading.Thread):
    """Notices the end of other ranks; ends this process too, unless it does so itself within some seconds.

    Attributes:
        leaving: set before the ranks part: an end is then none of its business.
        ended: ranks that have ended; where rank 0 has, it alone.
        noticed: set once `ended` is filled.
        ending: held by the thread that ends this process.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__(name="watch", daemon=True)
        self.leaving = False
        self.ended: list[int] = []
        self.noticed = threading.Event()
        self.ending = threading.Lock()
        self._rank = ranks.rank
        self._peers = _accept(ranks) if ranks.rank == 0 else _connect(ranks)
        self.start()

    def run(self) -> None:
        """Wait until a connection closes, or rank 0 says which have."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            ready = selector.select()
            if self._rank == 0:
                time.sleep(0.2)  # ranks of one node end together
                ready = selector.select()
        if self._rank == 0:
            self.ended = sorted(key.data for key, _ in ready)
            for rank, peer in self._peers.items():
                if rank not in self.ended:
                    _send(peer, json.dumps(self.ended))
        else:
            self.ended = json.loads(_receive(self._peers[0]) or "[0]")
        self.noticed.set()
        time.sleep(_GRACE_S)
        if self.leaving or not self.ending.acquire(blocking=False):
            return
        print(f"fledge: error: rank {self._rank}: {ended_message(self.ended)}", file=sys.stderr, flush=True)
        os._exit(1)


def _accept(ranks: Ranks) -> dict[int, socket.socket]:
    """Connect rank 0 with all others. They give a token, and a stranger who finds the port cannot."""
    token = secrets.token_hex(16)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", 0), family=family, backlog=ranks.world, dualstack_ipv6=family is socket.AF_INET6
    ) as server:
        server.settimeout(_MEETING_S)
        ranks.gather((server.getsockname()[1], token))
        peers: dict[int, socket.socket] = {}
        while len(peers) < ranks.world - 1:
            peer, _ = server.accept()
            peer.settimeout(_MEETING_S)
            peer_token, _, rank = _receive(peer).partition(" ")
            if secrets.compare_digest(peer_token.encode(), token.encode()):
                peers[int(rank)] = _kept_alive(peer)
            else:
                peer.close()
    return peers


def _connect(ranks: Ranks) -> dict[int, socket.socket]:
    (port, token), *_ = ranks.gather(None)
    peer = socket.create_connection((ranks.place.address, port), timeout=_MEETING_S)
    _send(peer, f"{token} {ranks.rank}")
    return {0: _kept_alive(peer)}


def _kept_alive(peer: socket.socket) -> socket.socket:
    """Have the system ask a silent other end whether it is there: a node that lost power does not say that it ends."""
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6)):
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    return peer


def _send(peer: socket.socket, line: str) -> None:
    try:
        peer.sendall(f"{line}\n".encode())
    except OSError:  # it has ended as well, and knows
        return


def _receive(peer: socket.socket) -> str:
    """Read one line; nothing if the other end has closed."""
    line = b""
    try:
        while not line.endswith(b"\n") and (more := peer.recv(4096)):
            line += more
    except OSError:  # a killed process may reset its connections
        return ""
    return line.decode(errors="replace").strip() if line.endswith(b"\n") else ""


def ended_message(ended: list[int], text: str = "") -> str:
    """Return which ranks have ended and what to do."""
    names = f"rank{'s' * (len(ended) > 1)} {', '.join(map(str, ended))}" if ended else "another rank"
    return (
        f"{names} ended: see the log there for the cause; start the same command again, training goes on from the "
        "newest checkpoint" + (f" ({text})" if text else "")
    )


def _report(error: BaseException, place: RankInfo, watch: Watch | None, timeout_s: int) -> int:
    """Say why this rank ends, and give its exit code."""
    text = " ".join(str(error).split()).partition(" This is typically caused by")[0]
    of_network = isinstance(error, RuntimeError)
    timed_out = of_network and bool(_TIMED_OUT.search(text))
    gone = of_network and not timed_out and bool(_PEER_GONE.search(text))
    if gone and watch:
        watch.noticed.wait(_GRACE_S)
    if watch and not watch.ending.acquire(blocking=False):
        time.sleep(_GRACE_S)  # the watch is ending this process
    message, code = "", 1
    if isinstance(error, KeyboardInterrupt):
        message, code = "interrupted; the same command goes on from here", 130
    elif isinstance(error, USER_ERRORS):
        message, code = explain(error), 2
    elif gone:
        message = ended_message(watch.ended if watch else [], text)
    elif watch is None and isinstance(error, dist.DistError):
        message = f"{place.world} ranks were to meet at {place.address}:{place.port}, and not all came ({text})"
    elif timed_out:
        message = (
            f"another rank has not answered for train.collective_timeout_s={timeout_s}: end the one that hangs; start "
            f"the same command again, training goes on from the newest checkpoint ({text})"
        )
    if not message or os.environ.get("FLEDGE_TRACEBACK") == "1":
        traceback.print_exception(error)
    if message:
        print(f"fledge: error: rank {place.rank}: {message}", file=sys.stderr)
    return code
