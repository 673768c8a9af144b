"""`fledge run`: every stage in order, each in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from hydra.core.hydra_config import HydraConfig

from .schema import Config

EXIT_AGAIN = 75  # stopped by a signal, with everything saved: the same command goes on (EX_TEMPFAIL of sysexits.h)
_GRACE_S = 60.0  # for the other processes of a stage to end after one has failed
STAGES = ("synthesize", "dump", "train", "evaluate", "export")


def run(config: Config) -> None:
    """Run the stages in order; a stage whose artifact is complete and whose inputs are unchanged ends at once.

    Exits with the code of the first stage that fails; started again, goes on there.
    """
    overrides = list(HydraConfig.get().overrides.task)
    started = time.monotonic()
    for number, stage in enumerate(STAGES, 1):
        print(f"[{number}/{len(STAGES)}] {stage}", flush=True)
        command = [sys.executable, "-m", "fledge", stage, *overrides]
        code = _run_stage(command, config.train.num_processes if stage == "train" else 1)
        if code:
            print(f"fledge: {stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
            sys.exit(code)
    print(f"run {config.name} is complete in {config.run_folder} ({time.monotonic() - started:.0f} s)")


def _run_stage(command: list[str], num_processes: int) -> int:
    """Run a stage to its end and give its exit code.

    A signal that asks to stop goes on to its processes; a keyboard's reaches them by itself. A process that ends
    because another has ended does so with 1, which therefore counts least.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, lambda _number, _frame: None)
    try:
        processes += [subprocess.Popen(command, env=environment) for environment in _environments(num_processes)]
        first: list[int | None] = []  # codes when the first process failed
        while None in (codes := [process.poll() for process in processes]):
            if not first and any(codes):
                first, deadline = codes, time.monotonic() + _GRACE_S
            if first and time.monotonic() > deadline:
                pass_on(signal.SIGKILL, None)
            time.sleep(0.05)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = [code for code in [*first, *codes] if code]
    code = next((code for code in failed if code != 1), max(failed, default=0))
    return code if code >= 0 else 128 - code


def _environments(num_processes: int) -> list[dict[str, str] | None]:
    """Give the environment of each process; several find each other by what torchrun would give them.

    (torchrun itself turns every exit code into 1 and dies of SIGUSR1.)
    """
    if num_processes == 1:
        return [None]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes))}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared = {**threads, **os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
