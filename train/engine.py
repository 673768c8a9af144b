"""DeepSpeed: its configuration, the learning rate it is given, and the end of a micro-batch."""

import contextlib
import io
import math
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ..conf.schema import DeepSpeedConfig, Dtype, TrainConfig


def micro_batches(packs_per_step: int) -> int:
    """Return how many packs each rank accumulates in an optimizer step."""
    ranks = dist.get_world_size()
    if packs_per_step % ranks:
        raise ValueError(f"train.packs_per_step must be a multiple of the {ranks} processes, got {packs_per_step}")
    return packs_per_step // ranks


def start_engine(module: nn.Module, options: TrainConfig, zero: DeepSpeedConfig, universal: bool = False) -> Any:
    """Wrap a module in a DeepSpeed engine with AdamW over its trained parameters.

    With `universal` a checkpoint is loaded in the format that is free of the number of ranks.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches(options.packs_per_step),
        "gradient_clipping": options.max_grad_norm,
        "zero_optimization": {"stage": zero.zero_stage},
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": options.dtype is Dtype.bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 30,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-batch
    }
    if zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    first, second = options.betas
    optimizer = torch.optim.AdamW(trained, lr=options.lr, betas=(first, second), weight_decay=options.weight_decay)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with contextlib.redirect_stdout(io.StringIO()):  # lines on memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # ZeRO 1 and 2 look in bfloat16 only; ZeRO 3 always does
    return engine


def end_micro_batch(engine: Any) -> bool:
    """Count a micro-batch; after the last of a step update the weights, and return whether that was done.

    A step whose gradient is not finite is skipped on every rank: DeepSpeed finds it when it takes the gradient's norm.
    """
    last = engine.is_gradient_accumulation_boundary()
    if engine.zero_optimization_stage() == 0 and last:
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        if not torch.stack([gradient.isfinite().all() for gradient in gradients]).all():
            engine.module.zero_grad()  # stage 0 does not look, and its step cannot be told to leave all as it is
            engine.micro_steps += 1
            return False
    engine.step()
    updated = bool(engine.was_step_applied())
    if last and not updated:  # with offload DeepSpeed (0.19) would add every further step's gradient to this one
        sums = getattr(engine.optimizer, "averaged_gradients", {})
        sums.update(dict.fromkeys(sums))
    return updated


def learning_rate(options: TrainConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of a step (from 0): linear warm-up, then a cosine down to `min_lr_share`."""
    warmup = max(1, round(options.warmup_share * num_steps))
    if step < warmup:
        return options.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = options.min_lr_share
    return options.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
