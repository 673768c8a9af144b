"""The architectures of draft heads, an entry each (docs/internals/add_a_head.md)."""

from dataclasses import dataclass
from typing import Any

from ..formats.fields import Field
from .config import DraftHeadConfig
from .draft_head import DraftHead
from .vocabulary import VocabularyMap


@dataclass(frozen=True)
class HeadArchitecture:
    """A head that fledge trains, decodes with and writes.

    The unroll of training and the cached decoder call `embed`, `lookup`, `project_embedding`, `fuse`, `rotary`, `step`
    and `lm_head` of its module, and read `config`, `target_ids`, `d2t` and `t2d`.
    """

    names: dict[str, str]  # in config.json, by serving format; "qwen3" in plain format, if q and k are normed
    config: type[DraftHeadConfig]
    module: type[DraftHead]
    fields: tuple[Field, ...] = ()  # its rows next to those of models/formats/fields.py


EAGLE3 = HeadArchitecture(
    {"plain": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM", "speculators": "Eagle3DraftModel"},
    DraftHeadConfig,
    DraftHead,
)
ARCHITECTURES = [EAGLE3]


def architecture_of(config: DraftHeadConfig) -> HeadArchitecture:
    """Return the architecture that a configuration belongs to."""
    return next(entry for entry in ARCHITECTURES if entry.config is type(config))


def named_architecture(values: dict[str, Any]) -> HeadArchitecture:
    """Return the architecture that a config.json names; else EAGLE-3, which other projects name in many ways."""
    names = values.get("architectures")
    names = names if isinstance(names, list) else []
    return next((entry for entry in ARCHITECTURES if set(entry.names.values()) & {str(n) for n in names}), EAGLE3)


def build_head(config: DraftHeadConfig, vocabulary: VocabularyMap | None = None) -> DraftHead:
    """Return an untrained head of a configuration's architecture."""
    return architecture_of(config).module(config, vocabulary)
