"""DeepSpeed's engine in every form: steps that are not finite among others, and without them.

Started on one process or, by torchrun, on several, for an optimizer; rank 0 prints one JSON line, of every form (ZeRO
stage, offload, number format) what a run gave.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
from builders import make_batch, make_head, matrices
from deepspeed.accelerator import get_accelerator
from fledge.conf.schema import Config, DeepSpeedConfig, Dtype, OptimizerName, TrainConfig
from fledge.train.engine import end_micro_batch, start_engine
from fledge.train.loss.unroll import TTTModule
from fledge.train.ranks.group import Ranks, joined

FORMS = [
    DeepSpeedConfig(zero_stage=stage, offload_optimizer=offload)
    for stage, offload in [(0, False), *itertools.product((1, 2, 3), (False, True))]
]
TTT_STEPS, PACKS = 2, 2
# By step, the micro-batch whose loss is not a number (of the last rank alone).
WITH, WITHOUT = [None, 0, PACKS - 1, None, None], [None, None, None]


def train(form: DeepSpeedConfig, dtype: Dtype, bad: list[int | None], ranks: Ranks) -> dict[str, Any]:
    """Train a small head; give which steps were applied, the losses of those steps, and the waits for the device."""
    optimizer = OptimizerName[sys.argv[1]]
    options = TrainConfig(dtype=dtype, packs_per_step=PACKS * ranks.world, lr=1e-2, optimizer=optimizer)
    engine = start_engine(TTTModule(make_head(), TTT_STEPS, 0.8), options, form)
    embedding, lm_head = (matrix.to(getattr(torch, dtype.value)) for matrix in matrices())
    applied, losses, good = [], [], itertools.count()
    waits = [0]
    get_accelerator().synchronize = lambda *_: waits.__setitem__(0, waits[0] + 1)
    for poisoned in bad:
        number = 0 if poisoned is not None else next(good)
        for place in range(PACKS):
            batch = make_batch([9, 14], seed=100 * number + 10 * ranks.rank + place)
            batch = batch.to(torch.device("cpu"), embedding.dtype, TTT_STEPS)
            if place == poisoned and ranks.rank == ranks.world - 1:
                batch.aux_hidden_states[3] = torch.nan
            loss, _ = engine(batch, embedding, lm_head)
            engine.backward(loss)
            updated = end_micro_batch(engine)
            if poisoned is None:
                losses.append(loss.item())
        applied.append(updated)
    del get_accelerator().synchronize
    return {"applied": applied, "losses": losses, "waits": waits[0]}


if __name__ == "__main__":
    with joined(Config(name="engine")) as ranks:
        found = {}
        for form, dtype in itertools.product(FORMS, (Dtype.float32, Dtype.bfloat16)):
            if form.zero_stage == 0 and dtype is Dtype.bfloat16:
                continue
            name = f"zero{form.zero_stage}{'_offload' * form.offload_optimizer}-{dtype.value}"
            found[name] = ranks.gather([train(form, dtype, bad, ranks) for bad in (WITH, WITHOUT)])
        if ranks.rank == 0:
            sys.stdout.write(json.dumps(found) + "\n")
