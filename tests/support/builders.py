"""Small heads, batches and runs that tests are made of."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run_command
from fledge.conf.cli import python_api
from fledge.conf.runtime.artifact import artifact, read_manifest
from fledge.conf.schema import Config, DraftConfig, HiddenStates, SynthesizeConfig, TrainConfig, VerifierConfig
from fledge.data_synthesis.answers.conversation import Conversation
from fledge.data_synthesis.answers.generation import Generation
from fledge.data_synthesis.answers.local import converse
from fledge.data_synthesis.conversations import FILE, content_digest
from fledge.data_synthesis.heldout import is_heldout
from fledge.data_synthesis.store.index import COUNTS_FILE, VOCABULARY_FILE, sidecar_checksums
from fledge.data_synthesis.store.shard import Sample, Shard, write_shard
from fledge.data_synthesis.store.store import write_index
from fledge.models.formats.training_folder import checkpoint_steps
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.vocabulary import build_vocabulary
from fledge.models.verifier.config import load_config, special_token_ids
from fledge.models.verifier.model import Verifier
from fledge.models.verifier.weights import verifier_identity
from fledge.train.metrics.tracking import read_metrics
from safetensors.torch import load_file, save_file
from small_heads import leave_out_first_tokens, make_batch, make_head, matrices
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

__all__ = ["leave_out_first_tokens", "make_batch", "make_head", "matrices"]  # beside what is here

OF_THE_MACHINE = {f"train/{name}" for name in ("tokens_per_s", "utilisation", "memory_gib", "data_wait_share")}

SMALL_DECODER = {  # of verifiers made on the spot
    "hidden_size": 64,
    "num_hidden_layers": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}
SMALL_LLAMA4 = {  # and what Llama 4 adds: experts in every other layer
    "intermediate_size": 64,
    "intermediate_size_mlp": 128,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
}
SMALL_VISION = {  # and a Llama 4 that takes images
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "vision_output_dim": 64,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
    "image_size": 28,
    "patch_size": 14,
}

composed = python_api.load_config  # the configuration of a command with these options


def save_byte_tokenizer(
    folder: Path, template: str, special: tuple[str, ...] = (), plain: tuple[str, ...] = ()
) -> None:
    """Save a tokenizer whose tokens are bytes, the end of a turn 256, and what is added after it."""
    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in bytes_to_unicode().items()}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", *special])
    tokenizer.add_tokens(list(plain))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = template
    fast.save_pretrained(folder)


def write_store(
    folder: Path,
    like: Path,
    masks: dict[str, str],
    share: float = 0.0,
    seed: int = 0,
    states: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A whole store of random tokens and states, of the verifier of another: a sample's mask by its id, as "00110"."""
    settings = {**read_manifest(like, "hidden_states")["settings"], "heldout_share": share}
    hidden, vocab = (settings["verifier"][name] for name in ("hidden_size", "vocab_size"))
    aux = hidden * len(settings["aux_layers"])
    generator = torch.Generator().manual_seed(seed)
    counts, samples = torch.zeros(vocab, dtype=torch.int64), []
    for name, text in masks.items():
        mask = torch.tensor([int(digit) for digit in text], dtype=torch.uint8)
        ids = torch.randint(0, vocab, (len(mask),), generator=generator, dtype=torch.int32)
        drawn = (torch.randn(len(mask), width, generator=generator) for width in (aux, hidden))
        made = [part.to(dtype) if states else None for part in drawn]
        samples.append(Sample(name, ids, mask, *made))
        if not is_heldout(name, share):
            counts += torch.bincount(ids[mask.bool()], minlength=vocab)
    with artifact(folder, "hidden_states", settings) as target:
        half = max(1, len(samples) // 2)
        parts = [samples[:half], samples[half:]]
        shards = [write_shard(folder, number, Shard.of(part)) for number, part in enumerate(parts)]
        save_file({"token_counts": counts}, folder / COUNTS_FILE)
        write_index(folder, shards)
        target.finish(shards=shards, files=sidecar_checksums(folder))
    return folder


def make_store(folder: Path, config: Config, masks: dict[str, str]) -> Path:
    """A whole store of random tokens and states, in `train.dtype`, of a verifier that has dumped nothing."""
    head = DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier))
    settings = {
        "verifier": verifier_identity(config.verifier),
        "conversations": "none",
        "heldout_share": 0.0,
        "aux_layers": list(head.aux_layers),
        "state_dtype": config.train.dtype.value,
        "last_states": "all",
    }
    with artifact(folder.with_name("like"), "hidden_states", settings) as like:
        like.finish(shards=[])
    write_store(folder, like.folder, masks, dtype=getattr(torch, config.train.dtype.value))
    counts = load_file(folder / COUNTS_FILE)["token_counts"]
    vocabulary = build_vocabulary(counts, config.draft.vocab_size, special_token_ids(config.verifier))
    save_file({"d2t": vocabulary.d2t, "t2d": vocabulary.t2d}, folder / VOCABULARY_FILE)
    return folder


@dataclass
class Run:
    """A run of the command line on the tiny verifier."""

    folder: Path
    verifier: Path
    name: str = "run"
    options: list[str] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def arguments(self, *overrides: str) -> list[str]:
        return [
            "experiment=demo",
            f"name={self.name}",
            f"runs_dir={self.folder}",
            f"verifier.path={self.verifier}",
            "verifier.device=cpu",
            "data.sources=[{path:embedded,limit:64}]",
            "data.heldout_share=0.25",
            "synthesize.max_tokens=64",
            "dump.keep_truncated=false",  # what evaluation decodes ends by itself, too
            "synthesize.batch_size=8",
            "dump.shard_tokens=500",
            "draft.vocab_size=300",
            "train.ttt_steps=3",
            "train.batch_tokens=256",
            "train.lr=3e-3",
            "train.max_steps=24",
            "train.save_every=9",
            "train.log_every=6",
            "train.heldout_every=12",
            "train.keep_checkpoints=9",
            "evaluate.questions_per_category=1",
            "evaluate.max_tokens=24",
            "tracking.wandb=disabled",
            *self.options,
            *overrides,
        ]

    def command(self, stage: str, *overrides: str, processes: int = 1) -> list[str]:
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m", "fledge"]
            return [sys.executable, *launcher, stage, *self.arguments(*overrides)]
        return [sys.executable, "-m", "fledge", stage, *self.arguments(*overrides)]

    def __call__(
        self, stage: str, *overrides: str, processes: int = 1, code: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a stage to its end; its exit code must be `code`."""
        done = run_command(self.command(stage, *overrides, processes=processes))
        assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done


def copy_folder(source: Path, target: Path) -> Path:
    """Copy a folder of a run that others use at the same time: their locks come and go."""
    return shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*lock*"))


def copy_parts(source: Run, target: Run, *parts: str) -> Run:
    """Give a run parts of another; if none is named, the conversations and the hidden states."""
    for part in parts or ("conversations", "hidden_states"):
        copy_folder(source.path / part, target.path / part)
    return target


def as_if_killed_after(run: Run, step: int) -> None:
    """Take a finished training back to one of its checkpoints."""
    checkpoints = run.path / "training" / "checkpoints"
    for later in checkpoint_steps(checkpoints):
        if later > step:
            shutil.rmtree(checkpoints / f"step-{later}")
    manifest = run.path / "training" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": False}))


def metrics_of(run: Run) -> list[dict[str, float]]:
    """Give the records of a training, without what depends on the machine."""
    return [{k: v for k, v in r.items() if k not in OF_THE_MACHINE} for r in read_metrics(run.path / "training")]


def conversation_record(
    name: str, *texts: str, sequences: Iterable[dict[str, Any]] | None = None, last: str = "stop"
) -> dict[str, Any]:
    """A line of conversations.jsonl: user and assistant in turn, the last answer finished as said."""
    return {
        "id": name,
        "source": "s",
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)],
        "finish_reasons": ["stop"] * (len(texts) // 2 - 1) + [last],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7},
        **({} if sequences is None else {"sequences": list(sequences)}),
    }


def recorded_sequence(tokens: list[int], *answers: tuple[int, int]) -> dict[str, Any]:
    return {"token_ids": tokens, "answers": [list(answer) for answer in answers]}


def conversations_run(
    folder: Path, verifier: VerifierConfig, *records: dict[str, Any], finished: bool = True
) -> Config:
    """The configuration of a run (tokens only) with these conversations."""
    config = Config(
        name="run",
        runs_dir=str(folder),
        verifier=verifier,
        draft=DraftConfig(vocab_size=300),
        train=TrainConfig(hidden_states=HiddenStates.online),
    )
    settings = {"verifier": verifier_identity(verifier), "heldout_share": 0.0, "synthesize": {"max_tokens": 9}}
    with artifact(config.conversations_folder, "conversations", settings) as target:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in records)
        (target.folder / FILE).write_text(lines)
        if finished:
            target.finish(counts={"conversations": len(records)}, content=content_digest(target.folder))
    return config


def assert_same_record(ours: dict[str, float], theirs: dict[str, float]) -> None:
    """Hold a record of metrics against that of a run which adds float32 in another order.

    Agreement counts rows, about 900 between two records: where a row's two likeliest tokens are equally likely to the
    last digit, it may go either way.
    """
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        near_ties = 2 / 900 if "agreement" in name else 1e-6
        assert value == pytest.approx(theirs[name], rel=1e-5, abs=near_ties), name


def converse_all(verifier: Verifier, conversations: list[Conversation], temperature: float, max_tokens: int) -> None:
    """Let a verifier in this process answer conversations."""
    options = SynthesizeConfig(max_tokens=max_tokens)
    tasks = (converse(verifier, conversation, temperature, options) for conversation in conversations)
    Generation(verifier, len(conversations)).run(tasks)
