"""DeepSpeed: its configuration, the optimizer and learning rate it is given, and the end of a micro-batch."""

import contextlib
import io
import itertools
import math
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ..conf.schema import DeepSpeedConfig, Dtype, OptimizerName, TrainConfig

_MOMENTUM = 0.95  # of Muon


def micro_batches(packs_per_step: int) -> int:
    """Return how many packs each rank accumulates in an optimizer step."""
    ranks = dist.get_world_size()
    if packs_per_step % ranks:
        raise ValueError(f"train.packs_per_step must be a multiple of the {ranks} processes, got {packs_per_step}")
    return packs_per_step // ranks


def start_engine(module: nn.Module, options: TrainConfig, zero: DeepSpeedConfig, universal: bool = False) -> Any:
    """Wrap a module in a DeepSpeed engine with `train.optimizer` over its trained parameters.

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
        "zero_allow_untested_optimizer": options.optimizer is OptimizerName.muon,
    }
    if zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    optimizer = make_optimizer(module, options)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls
    with contextlib.redirect_stdout(io.StringIO()):  # lines on memory
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    if isinstance(optimizer, Muon):
        optimizer.find_layouts(engine.optimizer, zero.zero_stage)
    if hasattr(engine.optimizer, "check_grad_overflow"):
        engine.optimizer.check_grad_overflow = True  # ZeRO 1 and 2 look in bfloat16 only; ZeRO 3 always does
    return engine


def make_optimizer(module: nn.Module, options: TrainConfig) -> torch.optim.AdamW:
    """Return `train.optimizer` over the trained parameters of a module."""
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    first, second = options.betas
    shared: dict[str, Any] = {"lr": options.lr, "betas": (first, second), "weight_decay": options.weight_decay}
    if options.optimizer is OptimizerName.adamw:
        return torch.optim.AdamW([parameter for _, parameter in trained], **shared)
    rest, matrices = list[Tensor](), list[Tensor]()
    for name, parameter in trained:
        is_matrix = parameter.dim() == 2 and name.split(".")[-2] not in ("lm_head", "embed_tokens")
        (matrices if is_matrix else rest).append(parameter)
    products = torch.bfloat16 if options.dtype is Dtype.bfloat16 else torch.float32
    return Muon(rest, matrices, (options.muon_lr or options.lr) / options.lr, products, **shared)


class Muon(torch.optim.AdamW):
    """Muon (https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for the rest, under every ZeRO stage.

    A matrix has `lr_factor` of the learning rate, and updates with the usual RMS of AdamW's (arXiv:2502.16982).
    DeepSpeed's own Muon depends on the stage: it clips the gradient at 0, and the orthogonal update at 2 and 3.

    Momentum and direction are sums of single elements, so a rank forms those of its partition; then all gather the
    directions, and each orthogonalises the matrices that its partition has a part of. States have AdamW's names and
    number, and groups the same options, or DeepSpeed would not convert them for another number of processes.
    """

    def __init__(
        self, rest: list[Tensor], matrices: list[Tensor], lr_factor: float, products: torch.dtype, **options: Any
    ) -> None:
        super().__init__([{"params": group} for group in (rest, matrices) if group], **options)
        self.lr_factor, self.products = lr_factor, products
        # What Muon updates: matrices, or by the flat partition that ZeRO makes of a group of them, a width and shapes
        # for each stretch of it. The stretches of all ranks, in a row, are matrices of these shapes, and padding.
        self.layouts: dict[Tensor, list[tuple[int, list[torch.Size]]] | None] = dict.fromkeys(matrices)

    def find_layouts(self, zero: Any, stage: int) -> None:
        """Note how DeepSpeed's optimizer lays out the matrices in the ranks' partitions."""
        if stage == 3:  # of every parameter each rank has a stretch
            for flat, group in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
                if group[0] in self.layouts:
                    self.layouts[flat] = [(p.partition_numel(), [p.ds_shape]) for p in group]
        elif stage > 0:
            if hasattr(zero, "bf16_groups"):  # stage 1 in bfloat16
                parts = zip(zero.fp32_groups_flat_partition, zero.bf16_groups, strict=True)
            else:
                parts = zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True)
            for flat, group in parts:
                if group[0] in self.layouts:
                    self.layouts[flat] = [(len(flat), [p.shape for p in group])]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        by_muon = [any(parameter in self.layouts for parameter in group["params"]) for group in groups]
        self.param_groups = [group for group, is_muon in zip(groups, by_muon, strict=True) if not is_muon]
        if self.param_groups:
            super().step()
        self.param_groups = groups
        for group in itertools.compress(groups, by_muon):
            for parameter in group["params"]:
                self._update(parameter, group["lr"] * self.lr_factor, group["weight_decay"])

    def _update(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, gradient, layout = self.state[parameter], parameter.grad, self.layouts[parameter]
        assert gradient is not None
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            state["step"] = torch.zeros(())
        state["step"] = state["step"] + 1  # not in place: after a conversion at ZeRO 3 it is AdamW's own tensor
        momentum = state["exp_avg"].lerp_(gradient, 1 - _MOMENTUM)
        direction = gradient.lerp(momentum, _MOMENTUM)
        if layout is None:
            update = _orthogonal(direction, self.products)
        else:
            update = _orthogonal_part(direction, layout, self.products)
        parameter.mul_(1 - lr * weight_decay).sub_(update, alpha=lr)


def _orthogonal_part(direction: Tensor, layout: list[tuple[int, list[torch.Size]]], products: torch.dtype) -> Tensor:
    """Return this rank's partition of the matrices' updates, from its partition of their directions [n]."""
    local = direction.to(get_accelerator().current_device_name())  # with offload it lies on the CPU
    rank, ranks = dist.get_rank(), dist.get_world_size()
    gathered = local.new_empty(ranks, len(local))
    dist.all_gather(list(gathered), local)
    widths = [width for width, _ in layout]
    for (width, shapes), part, update in zip(layout, gathered.split(widths, 1), local.split(widths), strict=True):
        row, start = part.reshape(-1), 0
        for shape in shapes:
            end = start + shape.numel()
            if start < (rank + 1) * width and end > rank * width:
                row[start:end] = _orthogonal(row[start:end].view(shape), products).flatten()
            start = end
        update.copy_(row[rank * width : (rank + 1) * width])
    return local.to(direction.device)


def _orthogonal(matrix: Tensor, products: torch.dtype) -> Tensor:
    """Return the nearest orthogonal matrix, about, by five Newton-Schulz steps, with an RMS of 0.2 for a full rank.

    They need no more than bfloat16, in which a CPU or GPU that trains in it multiplies twice as fast or more.
    """
    x = matrix.to(products)
    x = x.T if len(x) > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    x = x.T if len(matrix) > matrix.shape[1] else x
    return x.to(matrix.dtype) * (0.2 * max(matrix.shape) ** 0.5)


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
