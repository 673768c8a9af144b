"""How much there is of everything: tokens, disk by stage, operations and hours by stage."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...conf.runtime.artifact import read_manifest
from ...conf.schema import Config, EvaluateEngine, ExportFormat, HiddenStates, LastStates, StateDtype
from ...data_synthesis.store.state_format import TOKEN_BYTES, StateFormat
from ...models.formats.serving_formats import SERVING_FORMATS
from ...models.head.config import DraftHeadConfig
from ...train.metrics.cost import plain_flops
from .gpus import GPUS
from .memory import TrainingShape
from .verifier_shape import VerifierShape

CHARS_A_TOKEN = 5.0  # of a conversation's line, its JSON counted
BANDWIDTH_SHARE = 0.5  # of a GPU's, that decoding one answer at a time reaches
QUESTIONS, TURNS, CATEGORIES = 80, 2, 8  # of MT-Bench and of the embedded questions


@dataclass(frozen=True)
class Tokens:
    """What there is to read and write."""

    conversations: int
    tokens: int
    counted: int  # written by the verifier
    source: str  # where the figures are from

    @property
    def mean(self) -> float:
        """Tokens of a conversation."""
        return self.tokens / max(1, self.conversations)


def find_tokens(config: Config) -> Tokens:
    """Count in the store, or estimate from the conversations, or from the options: the first that is there."""
    options = config.plan
    if manifest := _manifest(config.hidden_states_folder, "hidden_states"):
        counts = manifest["counts"]
        number, tokens, written = (int(counts[name]) for name in ("samples", "tokens", "counted_tokens"))
        return Tokens(number, tokens, written, f"counted in {config.hidden_states_folder}")
    if manifest := _manifest(config.conversations_folder, "conversations"):
        number, written = (manifest["counts"][name] for name in ("conversations", "completion_tokens"))
        about = f"answers counted in {config.conversations_folder}, prompts by plan.counted_share"
        return Tokens(number, round(written / options.counted_share), written, about)
    wanted = options.conversations or config.data.limit
    if wanted is None:
        raise ValueError(
            f"plan.conversations is required: {config.run_folder} has no conversations yet, and data.limit is not set"
        )
    tokens = round(wanted * options.mean_tokens)
    name = "plan.conversations" if options.conversations else "data.limit"
    about = f"{name} of plan.mean_tokens={options.mean_tokens:g}"
    return Tokens(wanted, tokens, round(tokens * options.counted_share), about)


def _manifest(folder: Path, kind: str) -> dict[str, Any] | None:
    try:
        return read_manifest(folder, kind)
    except ValueError:
        return None


def disk(config: Config, tokens: Tokens, head: DraftHeadConfig, shape: TrainingShape) -> dict[str, int]:
    """Give bytes by artifact.

    A checkpoint has the weights twice (DeepSpeed's and the plain head), float32 master weights and Adam's moments; the
    newest stay, and the best, while one more is written.
    """
    options = config.train
    every, _ = shape.parameters
    exports = len(SERVING_FORMATS) if config.export.format is ExportFormat.all else 1
    checkpoint = checkpoint_bytes(shape)
    stored = tokens.tokens * (
        TOKEN_BYTES if options.hidden_states is HiddenStates.online else store_bytes(config, head, tokens)
    )
    return {
        "conversations": round(tokens.tokens * CHARS_A_TOKEN),
        "hidden states": round(stored),
        "tokens beside them": tokens.tokens * TOKEN_BYTES * (options.hidden_states is HiddenStates.offline),
        f"checkpoints: {options.keep_checkpoints} newest, the best, one being written": checkpoint
        * (options.keep_checkpoints + 2),
        "exports": exports * every * getattr(torch, config.export.dtype.value).itemsize,
    }


def checkpoint_bytes(shape: TrainingShape) -> int:
    """Give the bytes of one checkpoint, over all ranks."""
    every, trained = shape.parameters
    return 2 * every * shape.item + (12 if shape.zero_stage else 8) * trained


def store_bytes(
    config: Config,
    head: DraftHeadConfig,
    tokens: Tokens,
    dtype: StateDtype | None = None,
    last: LastStates | None = None,
) -> float:
    """Give the bytes that a token takes in a store with states, as `fledge dump` announces them."""
    stored = (dtype or config.dump.dtype or config.verifier.dtype).value
    form = StateFormat(getattr(torch, stored), (last or config.dump.last_states) is LastStates.counted)
    counted = tokens.counted / max(1, tokens.tokens)
    return form.bytes_per_token(len(head.aux_layers), head.verifier_hidden_size, counted) + TOKEN_BYTES


@dataclass(frozen=True)
class Cost:
    """What a stage computes, and how long the GPUs take."""

    flops: float
    hours: float
    assumed: str


def costs(config: Config, tokens: Tokens, head: DraftHeadConfig, verifier: VerifierShape) -> dict[str, Cost]:
    """Give operations and hours by stage.

    The verifier computes two operations a parameter that a token meets, and attention to half of the context; training
    what train/metrics/cost.py counts, of every conversation in every epoch. Online, its reading comes on top.
    """
    options, kind, training = config.plan, GPUS[config.plan.gpu], config.train
    gpus = options.num_nodes * options.gpus_per_node
    bf16, own = (
        gpus * kind.bf16_tflops * 1e12,
        gpus * (kind.fp8_tflops if verifier.fp8_inputs else kind.bf16_tflops) * 1e12,
    )
    reading = verifier.flops(tokens.tokens, tokens.mean)
    length, counted = round(tokens.mean), round(tokens.counted / max(1, tokens.conversations))
    each = plain_flops(head, config.draft.train_lm_head, [length], [counted] * training.ttt_steps)
    seen = training.epochs * tokens.tokens
    if training.max_steps is not None:
        seen = training.max_steps * training.packs_per_step * training.batch_tokens
    learning = each * seen / max(1, length)
    rates = {
        "decoding": (own * options.decode_utilisation, f"{options.decode_utilisation:.0%} of the peak"),
        "reading": (own * options.read_utilisation, f"{options.read_utilisation:.0%} of the peak"),
        "training": (bf16 * options.train_utilisation, f"{options.train_utilisation:.0%} of the peak"),
    }

    def cost(flops: float, rate: str) -> Cost:
        return Cost(flops, flops / rates[rate][0] / 3600, rates[rate][1])

    found = {"synthesize": cost(reading, "decoding")}
    if training.hidden_states is HiddenStates.offline:
        found["dump"] = cost(reading, "reading")
        found["train"] = cost(learning, "training")
    else:
        again = cost(verifier.flops(seen, tokens.mean), "reading")
        own_cost = cost(learning, "training")
        found["train, the verifier beside it"] = Cost(
            again.flops + own_cost.flops, again.hours + own_cost.hours, own_cost.assumed
        )
    return found | {"evaluate": _evaluation(config, verifier, kind.bandwidth_tb_s * 1e12)}


def _evaluation(config: Config, verifier: VerifierShape, bandwidth: float) -> Cost:
    """Count rounds of one answer at a time, each of which reads the weights that a token meets, once."""
    options = config.evaluate
    per_category = options.questions_per_category
    questions = QUESTIONS if per_category is None else min(QUESTIONS, per_category * CATEGORIES)
    answers = questions * TURNS + options.heldout_prompts
    drafters = 1 / config.plan.acceptance_length + (3 if options.baselines else 1)
    rounds = answers * options.max_tokens * drafters
    together = options.engine is EvaluateEngine.server or config.verifier.tensor_parallel
    gpus = config.plan.gpus_per_node if together else 1
    seconds = rounds * verifier.active_bytes / (bandwidth * gpus * BANDWIDTH_SHARE)
    about = f"{BANDWIDTH_SHARE:.0%} of the memory's bandwidth, answers of evaluate.max_tokens"
    return Cost(2.0 * verifier.active * rounds, seconds / 3600, about)
