"""The processes of a training run: they meet, compare what they are about to do, and end together.

Next to the group that trains (NCCL, or gloo on the CPU) stands a gloo group for words between the ranks. NCCL does not
notice a peer's end: rank 0 does (watch.py), and tells the others, wherever they are waiting.

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

import dataclasses
import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
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
from ...conf.runtime.artifact import differences, digest, file_digest
from ...conf.runtime.rank_info import RankInfo, own_gpus, read_rank_info
from ...conf.runtime.signals import Stopped
from ...conf.schema import Config
from .watch import GRACE_S, MEETING_S, Watch, ended_message

_PEER_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|remote process exited|pair closure", re.I)
_TIMED_OUT = re.compile(r"timed out|timeout", re.I)


class Ranks:
    """The ranks of a run as one of them sees them."""

    def __init__(self, place: RankInfo, gpus: range | None, timeout_s: int) -> None:
        self.gpus = gpus  # that this rank has to itself; it trains on the first
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
        """Compare JSON-able facts of all ranks; if any differ, ValueError on every rank has ranks and dotted names."""
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
    """Add a tensor over all ranks, in place, and return it."""
    dist.all_reduce(values)
    return values


@contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """Join the other ranks, if there are any; on leaving, wait for them.

    Of several ranks each process ends here, whatever happened, with the exit code of the table above. An ordinary end
    of the interpreter would not do: gloo's threads now and then abort a process whose interpreter has shut down (2 of
    24 runs on a busy machine), and NCCL may wait for a rank that is gone.
    """
    place, timeout_s = read_rank_info(os.environ), config.train.collective_timeout_s
    if place.world == 1:
        yield _meet(place, timeout_s)
        dist.destroy_process_group()
        return
    code, watch = 1, None
    try:
        ranks = _meet(place, timeout_s)
        options = dataclasses.asdict(config)
        del options["dump"]["folder"], options["verifier"]["path"]  # may be copies; what they hold is compared
        ranks.agree({"fledge": __version__, "source": source_digest(), **options})
        ranks.check_devices()
        watch = Watch(place, ranks.gather)
        sum_over_ranks(torch.zeros(1, device=ranks.device))  # NCCL's barriers use the GPU of a group's first collective
        try:
            yield ranks
            code = 0
        except Stopped:  # the other ranks may be anywhere, and are not waited for
            raise
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        watch.leaving = True
        ranks.any_rank(False)
    except Stopped as stopped:
        code = int(stopped.code or 1)
    except BaseException as error:  # the process ends here
        code = _report(error, place, watch, timeout_s)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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
        meeting = min(timeout, timedelta(seconds=MEETING_S))
        store, *_ = next(rendezvous("env://", place.rank, place.world, timeout=meeting))
        store.set_timeout(timeout)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=timeout)
    deepspeed.init_distributed(dist_backend=backend, verbose=False)  # takes the group that is there
    return Ranks(place, gpus, timeout_s)


def source_digest() -> str:
    """Hash the code that trains."""
    root = Path(__file__).parents[2]
    packages = ("conf", "data_synthesis", "models", "train")
    files = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return digest({str(path.relative_to(root)): file_digest(path) for path in files})


def _report(error: BaseException, place: RankInfo, watch: Watch | None, timeout_s: int) -> int:
    """Print why this rank ends, and return its exit code."""
    text = " ".join(str(error).split()).partition(" This is typically caused by")[0]
    timed_out = isinstance(error, RuntimeError) and bool(_TIMED_OUT.search(text))
    gone = isinstance(error, RuntimeError) and not timed_out and bool(_PEER_GONE.search(text))
    if gone and watch:
        watch.noticed.wait(GRACE_S)
    if watch and not watch.ending.acquire(blocking=False):
        time.sleep(GRACE_S)  # the watch is ending this process
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
