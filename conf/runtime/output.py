"""Standard output and error whose reader may leave (`| head`, a log's pipe that has ended)."""

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, ClassVar, TextIO


class Output:
    """A stream that may lose its reader.

    A command that only prints then ends as Unix tools do: silently, with the exit code of SIGPIPE. A stage goes on,
    and says so on the other stream: what it makes is in files.
    """

    stage: ClassVar[str] = ""  # what goes on without a reader; "": nothing does

    def __init__(self, stream: TextIO, other: str) -> None:
        self._stream, self._other = stream, other

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._read_or_left():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._read_or_left():
            self._stream.flush()

    @contextlib.contextmanager
    def _read_or_left(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            left = error.errno in (errno.EPIPE, errno.EIO)  # EIO: the terminal was closed
            if left and not self.stage:
                sys.exit(128 + signal.SIGPIPE)
            what = f"nobody reads {self.name} any more; {self.stage} goes on"
            if not left:  # the disk of a log is full
                what = f"error: {self.name} cannot be written: {error.strerror}"
            print(f"fledge: {what}", file=getattr(sys, self._other), flush=True)
            if not left:
                sys.exit(2)


@contextlib.contextmanager
def readers_may_leave() -> Iterator[None]:
    """Let standard output and error lose their reader without a traceback."""
    streams = sys.stdout, sys.stderr
    Output.stage = ""
    out, err = (stream or open(os.devnull, "w") for stream in streams)  # noqa: SIM115
    sys.stdout, sys.stderr = outputs = Output(out, "stderr"), Output(err, "stdout")  # type: ignore
    try:
        yield
    finally:
        try:
            for output in outputs:
                output.flush()
        finally:
            sys.stdout, sys.stderr = streams
