"""Real commands without the seconds of their imports: a process that has imported everything forks each.

A forked command has a session, arguments, environment, folder, signals and an exit code of its own, as one that a shell
starts. It looks to a test like `subprocess.Popen`. What libraries read when they are imported must be as that process
has it; a command with another such environment is started by `subprocess`. A forked `fledge run` forks its stages.
"""

from __future__ import annotations

import atexit
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, reduction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

from fledge.conf.cli import main
from fledge.conf.runtime import launch
from hydra.core.global_hydra import GlobalHydra

_FORKED, _CODE = [sys.executable, "-m", "fledge"], [sys.executable, "-c"]
_AT_IMPORT = ("OMP_", "GOMP_", "MKL_", "HF_", "TRITON_", "CUDA_", "TRANSFORMERS_", "TORCH", "PYTHONPATH", "LD_", "HOME")
_IMPORTED = (
    "conf.cli",
    "data_synthesis.dump",
    "data_synthesis.synthesize",
    "eval.evaluate",
    "models.export",
    "train.setup",
)
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([f"fledge.{module}" for module in _IMPORTED])


def popen(command: Sequence[str], **options: Any) -> Any:
    """Start a command of fledge's, or `python -c`: forked where that is the same, else by `subprocess.Popen`.

    Args:
        options: those of `subprocess.Popen`: env, cwd, stdout, stderr, text.
    """
    environment, parents = options.get("env") or dict(os.environ), _environment()
    alike = all(
        environment.get(name) == parents.get(name) for name in environment | parents if name.startswith(_AT_IMPORT)
    )
    known = options.keys() <= {"env", "cwd", "stdout", "stderr", "text"}
    if (list(command[:3]) != _FORKED and list(command[:2]) != _CODE) or not alike or not known:
        return subprocess.Popen(command, **options)
    return Forked(command, **{**options, "env": environment})


def run_command(command: Sequence[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, and return what it printed."""
    options = {"env": _environment(), **options}
    process = popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def fledge(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of fledge's to its end, with variables of its environment."""
    command = [sys.executable, "-m", "fledge", *arguments]
    return run_command(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def script_result(script: Path, *launcher: str, arguments: Sequence[str] = (), **options: Any) -> Any:
    """Run a script on the CPU; return what its last line says in JSON.

    Args:
        launcher: modules and options that Python starts the script with.
        arguments: the script's own.
        options: those of `subprocess.run`.
    """
    command = [sys.executable, *launcher, str(script), *arguments]
    environment = {**_environment(), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def import_without(module: str, *missing: str) -> None:
    """Import a module in a process of its own, where other modules are missing."""
    code = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\nimport {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def _environment() -> dict[str, str]:
    """Return the environment that the parent of all forked commands imports in."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


class _Running:
    """A running process, as `subprocess.Popen` shows it."""

    _process: Any
    returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs."""
        self.returncode = self._process.exitcode
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self._process.pid, number)


class Forked(_Running):
    """A command that was forked."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        cwd: Any = None,
        stdout: Any = None,
        stderr: Any = None,
        text: bool = False,
    ) -> None:
        self.args = list(command)
        self.stdout, out = _pipe(stdout, 1, text)
        self.stderr, err = (None, out) if stderr == subprocess.STDOUT else _pipe(stderr, 2, text)
        os.environ["OMP_NUM_THREADS"] = "1"  # of the parent, which starts with the first command
        arguments = self.args[1:], env, str(cwd or os.getcwd()), _Descriptor(out), _Descriptor(err)
        self._process = _context.Process(target=_run, args=arguments)
        with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # of the parent, as commands set it before they import
            self._process.start()
        self.pid = self._process.pid
        for descriptor, own in ((out, self.stdout), (err, self.stderr)):
            if own is not None:
                os.close(descriptor)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Read everything that it prints, and wait for the end."""
        found: dict[int, Any] = {}
        streams = [(number, stream) for number, stream in enumerate((self.stdout, self.stderr)) if stream is not None]
        readers = [threading.Thread(target=lambda n=n, s=s: found.update({n: s.read()})) for n, s in streams]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return found.get(0), found.get(1)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()


class Started:
    """A command at work, and what it says; `cold`: started by Python itself."""

    def __init__(
        self, command: Sequence[str], folder: Path, rank: int = 0, cold: bool = False, **variables: str
    ) -> None:
        self._path = folder / f"said-{rank}"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
        with open(self._path, "w") as file:
            start = subprocess.Popen if cold else popen
            self.process = start(list(command), stdout=file, stderr=subprocess.STDOUT, env=environment)

    @property
    def said(self) -> str:
        """All that it has printed so far."""
        return self._path.read_text()

    def wait(self, reached: Callable[[], object]) -> None:
        """Wait for something to happen while it runs."""
        while not reached():
            assert self.process.poll() is None, self.said
            time.sleep(0.005)

    def answers(self, number: int) -> bool:
        """Whether the process has a handler of its own for a signal."""
        caught = Path(f"/proc/{self.process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
        return bool(int(caught, 16) >> (number - 1) & 1)

    def stop(self, number: int) -> tuple[int, str]:
        """Send a signal; give the exit code and all that was said."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60), self.said


def _pipe(stream: Any, standard: int, text: bool) -> tuple[Any, int]:
    """Return the end that the test reads, if it asked for one, and the descriptor that the command writes."""
    if stream == subprocess.PIPE:
        reading, writing = os.pipe()
        return open(reading, "r" if text else "rb"), writing
    if stream == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_WRONLY)
    return None, standard if stream is None else stream if isinstance(stream, int) else stream.fileno()


class _Descriptor:
    """A file descriptor on its way to the command."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (reduction.DupFd(self.number),)


def _arrived(descriptor: Any) -> int:
    return int(descriptor.detach())


class _Stage(_Running):
    """A stage of a forked `fledge run`: a fork of that process."""

    def __init__(self, command: Sequence[str], env: dict[str, str] | None) -> None:
        arguments = list(command[1:]), env or dict(os.environ)
        self._process = multiprocessing.get_context("fork").Process(target=_become, args=arguments)
        self._process.start()


def _run(command: list[str], environment: dict[str, str], folder: str, out: int, err: int) -> None:
    """Be a command that a shell has started."""
    os.setsid()
    forkserver._forkserver.__init__()  # its helpers are its own children
    for descriptor, standard in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(descriptor, standard)
    os.chdir(folder)
    launch.subprocess = SimpleNamespace(Popen=_Stage)
    _become(command, environment)


def _become(command: list[str], environment: dict[str, str]) -> None:
    """Be the command: `python -m fledge ARGUMENTS` or `python -c CODE ARGUMENTS`.

    What the process it is forked from has set up is left behind.
    """
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    GlobalHydra.instance().clear()
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), write_through=through)
        for number, mode, through in ((0, "r", False), (1, "w", unbuffered), (2, "w", True))
    )
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["fledge", *command[2:]]
    code: Any = 0
    try:
        if command[0] == "-c":
            sys.modules["__main__"] = script = ModuleType("__main__")
            exec(command[1], script.__dict__)
        else:
            main(command[2:])
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
