"""`fledge run`: every stage in order, each in a process of its own."""

import os
import signal
import socket
import subprocess
import sys
import time

from hydra.core.hydra_config import HydraConfig

from ..schema import STAGES, Config, require
from .rank_info import RankInfo
from .signals import EXIT_AGAIN, StopSignals, deferred, listening

_GRACE_S = 60.0  # for the other processes of a stage to end after one has failed
_LEFT_OUT = """evaluate is left out, evaluate.engine=server has no evaluate.endpoint yet: serve the verifier with the \
export, then `fledge evaluate ... evaluate.endpoint=http://HOST:8000/v1`"""


def run(config: Config, arguments: list[str] | None = None) -> None:
    """Run the stages in order; a stage whose artifact is complete and whose inputs are unchanged ends at once.

    Evaluation by a server that is not named is left out: it can serve the head once that is exported.
    Exits with the code of the first stage that fails; started again, goes on there.

    Args:
        arguments: of the command line of every stage; None: the overrides of the command that this process is.
    """
    require(
        not config.verifier.tensor_parallel,
        "verifier.tensor_parallel must be false with `fledge run`, which records with one process: start `fledge dump` "
        "by torchrun, or use `fledge submit`",
    )
    arguments = list(HydraConfig.get().overrides.task) if arguments is None else arguments
    started, stage = time.monotonic(), STAGES[0]
    with deferred(lambda: f"passed on to `{stage}`, which ends first", then_stop=False) as signals:
        for number, stage in enumerate(STAGES, 1):
            if signals.received:
                signals.stop()
            is_left_out = stage == "evaluate" and config.evaluate.lacks_server
            print(f"[{number}/{len(STAGES)}] {_LEFT_OUT if is_left_out else stage}", flush=True)
            if is_left_out:
                continue
            run_or_exit(stage, arguments, config.train.num_processes if stage == "train" else 1, signals)
    print(f"run {config.name} is complete in {config.run_folder} ({time.monotonic() - started:.0f} s)")


def run_alone(stage: str, arguments: list[str], num_processes: int = 1) -> None:
    """Run one stage to its end, in processes of its own; exit as it does if it fails or is stopped."""
    with deferred(lambda: f"passed on to `{stage}`, which ends first", then_stop=False) as signals:
        run_or_exit(stage, arguments, num_processes, signals)
        if signals.received:
            signals.stop()


def run_or_exit(stage: str, arguments: list[str], num_processes: int, signals: StopSignals) -> None:
    """Run a stage to its end; exit as it does if it fails, or as a signal asks that it was passed."""
    code = run_stage([sys.executable, "-m", "fledge", stage, *arguments], environments(num_processes))
    if signals.received and code in (EXIT_AGAIN, 128 + signals.received):  # it had none to answer yet
        signals.stop()
    if code:
        print(f"fledge: {stage} ended with exit code {code}; the same command goes on there", file=sys.stderr)
        sys.exit(code)


def run_stage(command: list[str], environments: list[dict[str, str] | None]) -> int:
    """Run a stage to its end, a process in each environment, and return its exit code.

    A signal that asks to stop goes on to its processes. A process that ends because another has ended does so with 1,
    which therefore counts least.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[signal.Signals] = []

    def pass_on(number: signal.Signals) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    with listening(pass_on):
        for environment in environments:
            processes.append(subprocess.Popen(command, env=environment))
        for number in received[:1]:  # to those that were not there yet
            pass_on(number)
        first: list[int | None] = []  # codes when the first process failed
        while None in (codes := [process.poll() for process in processes]):
            if not first and any(codes):
                first, deadline = codes, time.monotonic() + _GRACE_S
            if first and time.monotonic() > deadline:
                pass_on(signal.SIGKILL)
            time.sleep(0.05)
    failed = [code for code in [*first, *codes] if code]
    code = next((code for code in failed if code != 1), max(failed, default=0))
    return code if code >= 0 else 128 - code


def environments(num_processes: int, node: RankInfo | None = None) -> list[dict[str, str] | None]:
    """Return the environment of each process; several find each other by what torchrun would set.

    (torchrun itself turns every exit code into 1 and dies of SIGUSR1.) `node` is this node's launcher among several.
    """
    node = node or RankInfo()
    if num_processes * node.world == 1:
        return [None]
    shared = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_processes)), **os.environ}
    world, first = num_processes * node.world, num_processes * node.rank
    meeting = num_processes, node.address, node.port or _free_port()
    ranks = [RankInfo(first + number, world, number, *meeting) for number in range(num_processes)]
    return [shared | rank.environment() for rank in ranks]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
