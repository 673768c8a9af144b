"""DeepSpeed: its configuration, and the learning rate it is given."""

from __future__ import annotations

import math
from typing import Any

import deepspeed
import torch
from torch import nn

from ..conf.schema import Config, Dtype, TrainConfig


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
