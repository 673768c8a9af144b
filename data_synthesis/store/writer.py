"""Shards are written by a thread, while the verifier fills the next one."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from safetensors import SafetensorError
from torch import Tensor

from ...conf.runtime.signals import Stopped, deferred
from .mapped_shard import part_name, shard_name
from .shard import Shard, write_shard


class BackgroundWriter:
    """Writes shards in the order they are put; one is written and one waits. A context: at its end all are written.

    `scratch`, of the same file system, takes unfinished files. What the thread met is raised by `put` or at the end,
    as ValueError if a shard cannot be written.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self._folder, self._scratch = folder, scratch
        self._thread = ThreadPoolExecutor(1, "shard writer")
        self._writes: deque[Future[None]] = deque()  # whose end was not looked at
        self._spare: list[dict[str, Tensor]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with deferred("it ends as soon as the shards it has are written"):
            self._thread.shutdown()
        if kind is None or issubclass(kind, Stopped):
            for write in self._writes:
                write.result()

    def spare_buffers(self) -> dict[str, Tensor]:
        """Return the buffers of a shard that is written, if there are any."""
        return self._spare.pop() if self._spare else {}

    def put(self, number: int, shard: Shard) -> None:
        """Hand over a shard, which is not to be changed any more; waits while another waits."""
        while self._writes and (len(self._writes) > 1 or self._writes[0].done()):
            self._writes.popleft().result()
        self._writes.append(self._thread.submit(self._write, number, shard))

    def _write(self, number: int, shard: Shard) -> None:
        try:
            write_shard(self._folder, number, shard, self._scratch)
            if not shard.is_part:  # what an interrupted start had of it is done with
                (self._folder / part_name(number)).unlink(missing_ok=True)
                self._spare.append(shard.buffers)
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self._folder / shard_name(number)} cannot be written ({error}): see to room and rights "
                "there, or set dump.folder to another disk; the same command goes on after the shards written"
            ) from None
