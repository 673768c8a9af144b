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
        code = _end_of(_start(command, config.train.num_processes if stage == "train" else 1))
        if code:
            print(f"fledge: {stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
            sys.exit(code)
    print(f"run {config.name} is complete in {config.run_folder} ({time.monotonic() - started:.0f} s)")


def _start(command: list[str], num_processes: int) -> list[subprocess.Popen[bytes]]:
    """Start a stage; several processes find each other by the environment that torchrun would give them.

    (torchrun itself turns every exit code into 1 and dies of SIGUSR1.)
    """
    if num_processes == 1:
        return [subprocess.Popen(command)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    threads = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes))}
    sizes = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared = {**threads, **os.environ, **sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes))
    return [subprocess.Popen(command, env={**shared, **rank}) for rank in ranks]


def _end_of(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all processes of a stage and give its exit code.

    A signal that asks to stop goes on to them; a keyboard's has reached them already. A process that ends because
    another has ended does so with 1, which therefore counts least.
    """

    def pass_on(number: int, _frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        codes = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    failed = sorted((code for code in codes if code), key=lambda code: code == 1)
    return 0 if not failed else failed[0] if failed[0] > 0 else 128 - failed[0]
