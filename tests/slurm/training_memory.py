"""Train in this process and print how much memory that takes: `python tests/slurm/training_memory.py FOLDER SPEC`.

The peak of the anonymous resident size, sampled every millisecond, above what it is after a small training in the same
process (which has loaded what is loaded once). Memory that is given back must be given back to the system, and caches
of the libraries for matrix products be off, so the environment has to be `QUIET`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from architectures import make_model, save_verifier
from builders import make_store
from fledge.conf.schema import (
    Config,
    DeepSpeedConfig,
    Device,
    DraftConfig,
    Dtype,
    StoreConfig,
    TrackingConfig,
    TrainConfig,
    VerifierConfig,
    WandbMode,
)
from fledge.models.verifier.config import load_tokenizer
from fledge.train.ranks.group import joined
from fledge.train.setup import _train

QUIET = {
    "MALLOC_MMAP_THRESHOLD_": "500000",
    "MALLOC_TRIM_THRESHOLD_": "500000",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
    "LRU_CACHE_CAPACITY": "1",  # of oneDNN's primitives, as is the next
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Spec:
    """A training of random tokens and states."""

    dtype: str = "float32"
    hidden_size: int = 64
    intermediate_size: int = 128
    num_heads: int = 2
    num_kv_heads: int = 1
    vocab_size: int = 1000
    draft_vocab_size: int = 1000
    ttt_steps: int = 3
    batch_tokens: int = 256
    packs_per_step: int = 1
    zero_stage: int = 1
    recompute: bool = False
    form: dict[str, Any] = field(default_factory=dict)  # of the head: options of `draft`


def prepare(spec: Spec, folder: Path, tokenizer_of: str) -> None:
    """Write the verifier (in another type than is trained in, so that its matrices are copied) and the store."""
    stored = Dtype.bfloat16 if spec.dtype == "float32" else Dtype.float32
    model = make_model(
        "llama",
        spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.hidden_size // spec.num_heads,
        max_position_embeddings=8192,
    )
    tokenizer = load_tokenizer(VerifierConfig(path=tokenizer_of))
    save_verifier(model.to(getattr(torch, stored.value)), tokenizer, folder / "verifier")
    masks = {f"s/{number}": "1" * (spec.batch_tokens // 2) for number in range(2 * spec.packs_per_step)}
    make_store(folder / "store", configuration(spec, folder), masks)


def configuration(spec: Spec, folder: Path) -> Config:
    return Config(
        name="run",
        runs_dir=str(folder),
        verifier=VerifierConfig(path=str(folder / "verifier"), dtype=Dtype(spec.dtype), device=Device.cpu),
        draft=DraftConfig(vocab_size=spec.draft_vocab_size, **spec.form),
        train=TrainConfig(
            ttt_steps=spec.ttt_steps,
            batch_tokens=spec.batch_tokens,
            packs_per_step=spec.packs_per_step,
            dtype=Dtype(spec.dtype),
            checkpoint_activations=spec.recompute,
            max_steps=2,
            data_workers=0,
            stores=[StoreConfig(str(folder / "store"))],
        ),
        deepspeed=DeepSpeedConfig(zero_stage=spec.zero_stage),
        tracking=TrackingConfig(wandb=WandbMode.disabled),
    )


class Sampled(threading.Thread):
    """The largest anonymous resident size since it was made."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0
        self.start()

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, anonymous())
            time.sleep(0.001)


def anonymous() -> int:
    """Give the bytes of this process that are not of files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main(folder: Path, spec: Spec) -> None:
    torch.set_num_threads(1)
    small = Spec(dtype=spec.dtype, zero_stage=spec.zero_stage, packs_per_step=int(os.environ.get("WORLD_SIZE", "1")))
    with joined(configuration(small, folder / "small")) as ranks:
        _train(configuration(small, folder / "small"), ranks)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before, sampled = anonymous(), Sampled()
        _train(configuration(spec, folder / "measured"), ranks)
        sys.stdout.write(f"PEAK {ranks.rank} {sampled.largest - before}\n")  # print would write the line's end apart


if __name__ == "__main__":
    main(Path(sys.argv[1]), Spec(**json.loads(sys.argv[2])))
