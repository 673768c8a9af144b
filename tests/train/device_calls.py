"""Which GPU fledge and DeepSpeed take, on a machine without any: `python tests/train/device_calls.py < LAUNCHES`.

A launch is the environments of its ranks and how many GPUs each of them sees. Its ranks are started, meet and make
engines at the stages 2 and 3 of ZeRO (0 and 1 do as 2). Only what a driver would answer is made up, and DeepSpeed's
accelerator notes the number of every device that it is asked for. Prints one JSON line: of every rank its own device,
and the numbers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from typing import Any, ClassVar
from unittest.mock import patch

import deepspeed
import torch
import torch.distributed as dist
from builders import make_head
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from fledge.conf.runtime.rank_info import read_rank_info
from fledge.conf.schema import DeepSpeedConfig, Dtype, TrainConfig
from fledge.train.engine import start_engine
from fledge.train.ranks.group import Ranks, _meet


class Recorder(CPU_Accelerator):
    """Computes on the CPU, and notes the GPU that would have been taken."""

    asked: ClassVar[list[int]] = []

    def set_device(self, device_index: Any) -> None:
        if not isinstance(device_index, torch.device):  # else it is one that `device_name` was asked for
            self.asked.append(int(device_index))

    def device_name(self, device_index: Any = None) -> str:
        if device_index is not None:
            self.asked.append(int(device_index))
        return "cpu"


def meet(num_gpus: int) -> tuple[Ranks, list[int]]:
    """Let a rank meet the others as on a machine with GPUs; give what it sets as the current one, too."""
    current: list[int] = []
    join = dist.init_process_group
    with (
        patch("torch.cuda.is_available", lambda: True),
        patch("torch.cuda.device_count", lambda: num_gpus),
        patch("torch.cuda.set_device", current.append),
        patch("torch.distributed.init_process_group", lambda _nccl, **how: join("gloo", **how)),
    ):
        return _meet(read_rank_info(os.environ), 60), current


def rank(environment: dict[str, str], num_gpus: int, told: Any) -> None:
    os.environ.update(environment)
    ranks, current = meet(num_gpus)
    asked = {}
    for stage in (2, 3):
        Recorder.asked = []
        options = TrainConfig(packs_per_step=ranks.world, dtype=Dtype.float32)
        start_engine(make_head(), options, DeepSpeedConfig(zero_stage=stage))
        asked[stage] = sorted(set(Recorder.asked))
    told.put((ranks.rank, {"device": str(ranks.device), "current": current, "asked": asked}))
    ranks.any_rank(False)
    os._exit(0)


def main() -> None:
    set_accelerator(Recorder())
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    context = multiprocessing.get_context("fork")
    found = {}
    for name, (environments, num_gpus) in json.load(sys.stdin).items():
        told = context.SimpleQueue()
        processes = [context.Process(target=rank, args=(each, num_gpus, told)) for each in environments]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            assert process.exitcode == 0, name
        found[name] = [said for _, said in sorted(told.get() for _ in processes)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
