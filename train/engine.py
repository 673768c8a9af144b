"""DeepSpeed: processes, its configuration, and the learning rate it is given."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ..conf.schema import Config, Dtype, TrainConfig
from .online import own_gpus


def start_processes() -> torch.device:
    """Join the process group that torchrun made (alone without one) and give this rank's device."""
    on_gpu = torch.cuda.is_available()
    for name, alone in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, alone)
    os.environ.setdefault("LOCAL_WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_PORT", "0")
    if not on_gpu:
        # Its extension would be compiled at first use, and a build killed half-way blocks every later process.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", own_gpus()[0])
    torch.cuda.set_device(device)
    return device


def stop_processes() -> None:
    """Leave the process group when every rank is done.

    Of several ranks on the CPU each then ends here: gloo's threads now and then abort a process whose interpreter has
    shut down already (2 of 24 runs on a busy machine), and the launcher would call the finished run failed.
    """
    dist.barrier()
    ends_here = dist.get_world_size() > 1 and dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if ends_here:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def deepspeed_config(config: Config) -> dict[str, Any]:
    """Derive DeepSpeed's configuration; the one place where its keys are written."""
    offload = {"offload_optimizer": {"device": "cpu"}} if config.deepspeed.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.train.micro_batches,
        "gradient_clipping": config.train.max_grad_norm,
        "zero_optimization": {"stage": config.deepspeed.zero_stage, **offload},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.train.dtype is Dtype.bfloat16},
        "steps_per_print": 1 << 30,
    }


def start_engine(module: nn.Module, config: Config) -> Any:
    """Wrap a module in a DeepSpeed engine with AdamW over its trained parameters."""
    options = config.train
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first, second = options.betas
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(first, second), weight_decay=options.weight_decay)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=deepspeed_config(config))
    return engine


def learning_rate(options: TrainConfig, step: int, num_steps: int) -> float:
    """Give the learning rate of a step (from 0): linear warm-up, then a cosine down to `min_lr_share`."""
    warmup = max(1, round(options.warmup_share * num_steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = options.min_lr_share
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Add a tensor over all ranks, in place, and give it back."""
    dist.all_reduce(values)
    return values
