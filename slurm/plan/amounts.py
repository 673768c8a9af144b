"""How much there is of everything: tokens, and disk by artifact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...conf.runtime.artifact import read_manifest
from ...conf.schema import Config, Dtype, ExportFormat, HiddenStates, LastStates, StateDtype
from ...data_synthesis.store.state_format import TOKEN_BYTES, StateFormat
from ...models.formats.serving_formats import SERVING_FORMATS
from ...models.head.config import DraftHeadConfig
from .memory import TrainingShape

CHARS_A_TOKEN = 5.0  # of a conversation's line, its JSON counted


@dataclass(frozen=True)
class Tokens:
    """What there is to read and write."""

    conversations: int
    tokens: int
    counted: int  # written by the verifier
    source: str  # of the figures

    @property
    def mean(self) -> float:
        """Tokens of a conversation."""
        return self.tokens / max(1, self.conversations)

    @property
    def counted_share(self) -> float:
        return self.counted / max(1, self.tokens)


def find_tokens(config: Config) -> Tokens:
    """Count in the store, or estimate from the conversations, or from the options: the first that is there."""
    options = config.plan
    if manifest := _manifest(config.hidden_states_folder, "hidden_states"):
        number, tokens, written = (int(manifest["counts"][name]) for name in ("samples", "tokens", "counted_tokens"))
        return Tokens(number, tokens, written, f"counted in {config.hidden_states_folder}")
    if manifest := _manifest(config.conversations_folder, "conversations"):
        number, written = (manifest["counts"][name] for name in ("conversations", "completion_tokens"))
        about = f"answers counted in {config.conversations_folder}, prompts by plan.counted_share"
        return Tokens(number, round(written / options.counted_share), written, about)
    conversations = options.conversations or config.data.limit
    if conversations is None:
        raise ValueError(
            f"plan.conversations is required: {config.run_folder} has no conversations yet, and data.limit is not set"
        )
    tokens = round(conversations * options.mean_tokens)
    name = "plan.conversations" if options.conversations else "data.limit"
    about = f"{name} of plan.mean_tokens={options.mean_tokens:g}"
    return Tokens(conversations, tokens, round(tokens * options.counted_share), about)


def _manifest(folder: Path, kind: str) -> dict[str, Any] | None:
    try:
        return read_manifest(folder, kind)
    except ValueError:
        return None


def stored_bytes(config: Config) -> int:
    """Return the bytes of the store that is there already."""
    manifest = _manifest(config.hidden_states_folder, "hidden_states")
    return int(manifest["counts"]["bytes"]) if manifest else 0


def disk(config: Config, tokens: Tokens, head: DraftHeadConfig, shape: TrainingShape) -> dict[str, int]:
    """Return bytes by artifact.

    A checkpoint has the weights twice (DeepSpeed's and the plain head), float32 master weights and Adam's moments; the
    newest stay, and the best, while one more is written.
    """
    every, trained = shape.parameters
    keep, is_online = config.train.keep_checkpoints, config.train.hidden_states is HiddenStates.online
    of_token = store_bytes(head, tokens, config.dump.dtype or config.verifier.dtype, config.dump.last_states)
    checkpoint = 2 * every * shape.item + (12 if shape.deepspeed.zero_stage else 8) * trained
    exports = len(SERVING_FORMATS) if config.export.format is ExportFormat.all else 1
    return {
        "conversations": round(tokens.tokens * CHARS_A_TOKEN),
        "hidden states": round(tokens.tokens * (TOKEN_BYTES if is_online else of_token)),
        "tokens beside them": 0 if is_online else tokens.tokens * TOKEN_BYTES,
        f"checkpoints: {keep} newest, the best, one being written": checkpoint * (keep + 2),
        "exports": exports * every * getattr(torch, config.export.dtype.value).itemsize,
    }


def store_bytes(head: DraftHeadConfig, tokens: Tokens, dtype: StateDtype | Dtype, last: LastStates) -> float:
    """Return the bytes that a token takes in a store with states, as `fledge dump` announces them."""
    form = StateFormat(getattr(torch, dtype.value), last is LastStates.counted)
    return form.bytes_per_token(len(head.aux_layers), head.verifier_hidden_size, tokens.counted_share) + TOKEN_BYTES
