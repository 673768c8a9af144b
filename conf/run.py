"""`fledge run`: every stage in order, each in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

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
        code = _end_of(subprocess.Popen(stage_command(stage, overrides, config.train.num_processes)))
        if code:
            print(f"fledge: {stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
            sys.exit(code if code > 0 else 128 - code)
    print(f"run {config.name} is complete in {config.run_folder} ({time.monotonic() - started:.0f} s)")


def _end_of(process: subprocess.Popen[bytes]) -> int:
    """Wait for a stage and give its exit code; a signal to stop goes on to it, a keyboard's has reached it."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: process.send_signal(received))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return process.wait()
    finally:
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def stage_command(stage: str, overrides: list[str], num_processes: int = 1) -> list[str]:
    """Give the command line of a stage; training on several processes starts through torchrun."""
    if stage == "train" and num_processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
        return [sys.executable, *launcher, "-m", "fledge.train", *overrides]
    return [sys.executable, "-m", "fledge", stage, *overrides]
