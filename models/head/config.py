"""The configuration of a draft head, and how it follows from the options and the verifier's configuration.

A head is a dense Llama, and its verifier may be anything. Its MLP is as wide as the verifier's `intermediate_size`; if
that is one expert's width, or narrower than the state next to experts, as all experts that a token meets together.
Attention has the verifier's heads; if their number does not divide the width, as many of the same size as it holds.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import LlamaConfig
from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from ...conf.schema import DraftConfig
from ..verifier.config import default_aux_layers

# What configurations of transformers call these; the first that is there counts.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
_DENSE_WIDTH = ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "ffn_dim")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# What a head has in common with its Llama configuration, by the same names.
_OF_LLAMA = [
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps"),
]

# Rotary embeddings of the Llama family, which every engine computes alike: not `dynamic`, which SGLang scales at any
# length and transformers, so training, beyond the maximal one only.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class DraftHeadConfig:
    """Everything that determines the shape and the arithmetic of a draft head."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    verifier_hidden_size: int
    aux_layers: tuple[int, ...]
    max_position_embeddings: int
    rope_parameters: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    rms_norm_eps: float = 1e-5
    num_layers: int = 1
    fc_norm: bool = True
    norm_output: bool = True
    norm_before_residual: bool = False
    own_embedding: bool = False  # if not, the head reads the verifier's
    norm_before_fc: bool = False  # one RMSNorm over the concatenated aux states
    attention_bias: bool = False  # of q, k, v and o
    qk_norm: bool = False  # an RMSNorm of head_dim for queries and one for keys, before the rotation, as in Qwen3
    sliding_window: int | None = None  # positions that the layers below see, their own included
    window_layers: tuple[int, ...] = ()

    @classmethod
    def from_verifier(cls, draft: DraftConfig, verifier: Any) -> DraftHeadConfig:
        """Derive the head's shape from the options and the verifier's language-model configuration."""
        sizes = head_sizes(draft, verifier)
        layers, hidden, width = verifier.num_hidden_layers, sizes["hidden_size"], verifier.hidden_size
        aux_layers = draft.aux_layers if draft.aux_layers is not None else default_aux_layers(layers)
        if not aux_layers or not set(aux_layers) <= set(range(layers)):
            raise ValueError(f"draft.aux_layers must be layers of the verifier, 0 to {layers - 1}, got {aux_layers}")
        if hidden != width and not draft.train_lm_head:
            raise ValueError(
                f"draft.train_lm_head must be true with draft.hidden_size={hidden}: the verifier's lm_head has rows of "
                f"{width}"
            )
        window_layers = draft.window_layers if draft.window_layers is not None else range(draft.num_layers)
        if not set(window_layers) <= set(range(draft.num_layers)):
            raise ValueError(
                f"draft.window_layers must be layers of the head, 0 to {draft.num_layers - 1}, got {window_layers}"
            )
        positions = required_size(verifier, "max_position_embeddings", "write there how many tokens it reads")
        return cls(
            **sizes,
            vocab_size=verifier.vocab_size,
            draft_vocab_size=draft.vocab_size or verifier.vocab_size,
            verifier_hidden_size=width,
            aux_layers=tuple(sorted(aux_layers)),
            max_position_embeddings=positions,
            rope_parameters=rope_of(verifier),
            rms_norm_eps=size_of(verifier, "rms_norm_eps") or 1e-5,
            num_layers=draft.num_layers,
            fc_norm=draft.fc_norm,
            norm_output=draft.norm_output,
            norm_before_residual=draft.norm_before_residual,
            own_embedding=hidden != width,
            norm_before_fc=draft.norm_before_fc,
            attention_bias=draft.attention_bias,
            qk_norm=draft.qk_norm,
            sliding_window=draft.sliding_window,
            window_layers=tuple(sorted(window_layers)) if draft.sliding_window else (),
        )

    def options(self) -> dict[str, Any]:
        """Return the options of `draft` that this head has, by name."""
        names = {entry.name for entry in fields(DraftConfig)}
        own = {name: value for name, value in asdict(self).items() if name in names}
        lists = {"aux_layers": list(self.aux_layers), "window_layers": list(self.window_layers) or None}
        return own | lists | {"vocab_size": self.draft_vocab_size}

    def window(self, layer: int) -> int | None:
        """Return how many positions a layer sees, its own included; None: all up to its own."""
        return self.sliding_window if layer in self.window_layers else None

    def llama_config(self) -> LlamaConfig:
        """Return the Llama configuration of the head's layers, for the rotary embedding."""
        return LlamaConfig(
            **{name: getattr(self, name) for name in _OF_LLAMA},
            num_hidden_layers=self.num_layers,
            rope_parameters=dict(self.rope_parameters),
            tie_word_embeddings=False,
        )


def size_of(verifier: Any, *names: str) -> Any:
    """Return the first of these sizes that a configuration has, else None; if layers differ in it, the commonest."""
    for name in names:
        try:
            value = getattr(verifier, name, None)
        except AmbiguousGlobalPerLayerAttributeError:  # which getattr does not take for a missing attribute
            value = [getattr(layer, name, None) for layer in verifier.per_layer_config]
        if isinstance(value, list | tuple):
            value = Counter(value).most_common(1)[0][0] if value else None
        if value is not None:
            return value
    return None


def required_size(verifier: Any, name: str, cure: str) -> int:
    """Return a size that a head cannot do without; raise ValueError if the verifier's configuration has none."""
    value = size_of(verifier, name)
    if value is None:
        raise ValueError(f"verifier.path: config.json of {verifier.model_type} has no {name}: {cure}")
    return int(value)


def num_active_experts(verifier: Any) -> int:
    """Return how many routed experts a token meets in a layer; 0: the verifier has none."""
    return int(size_of(verifier, *_ACTIVE) or 0) if num_experts(verifier) > 1 else 0


def num_experts(verifier: Any) -> int:
    """Return how many routed experts a layer has."""
    return int(size_of(verifier, *_EXPERTS) or 0)


def head_sizes(draft: DraftConfig, verifier: Any) -> dict[str, Any]:
    """Return widths and counts of a head's layers; raise ValueError by the name of an option that does not fit."""
    hidden = draft.hidden_size or required_size(verifier, "hidden_size", "fledge cannot derive a head from it")
    attention = _attention(draft, verifier, hidden)
    return {"hidden_size": hidden, "intermediate_size": draft.intermediate_size or _width(verifier)[0], **attention}


def _width(verifier: Any) -> tuple[int, str]:
    """Return the width of the head's MLP, and what it is."""
    dense, hidden = size_of(verifier, *_DENSE_WIDTH), size_of(verifier, "hidden_size")
    active, expert = num_active_experts(verifier), size_of(verifier, *_EXPERT_WIDTH)
    apart = expert is not None or size_of(verifier, "intermediate_size_mlp") is not None
    if dense and (not active or (apart and dense >= hidden)):
        return int(dense), "the verifier's own"
    expert = expert or size_of(verifier, "intermediate_size")
    if not active or not expert:
        raise ValueError(
            f"draft.intermediate_size is required: config.json of {verifier.model_type} does not say how wide its MLP "
            f"is (four times its hidden_size={hidden} is usual)"
        )
    shared = size_of(verifier, *_SHARED_WIDTH) or (size_of(verifier, *_SHARED) or 0) * expert
    beside = f", and shared ones of {shared}" if shared else ""
    return int(active * expert + shared), f"the {active} experts of {expert} that a token meets{beside}"


def _attention(draft: DraftConfig, verifier: Any, hidden: int) -> dict[str, int]:
    option, verifier_heads = draft.num_attention_heads, size_of(verifier, "num_attention_heads")
    head_dim = draft.head_dim or size_of(verifier, "head_dim")
    if not verifier_heads and not (option and head_dim):
        raise ValueError(
            f"draft.num_attention_heads and draft.head_dim are required: config.json of {verifier.model_type} has no "
            "num_attention_heads"
        )
    head_dim = head_dim or size_of(verifier, "hidden_size") // verifier_heads
    if head_dim % 2:
        raise ValueError(f"draft.head_dim must be even, rotation takes dimensions in pairs, got {head_dim}")
    if option and hidden % option:
        raise ValueError(
            f"draft.num_attention_heads must divide the head's width of {hidden}, or no engine reads it, got {option}"
        )
    if option or not hidden % verifier_heads:
        heads = option or verifier_heads
    else:  # as many as the width holds, and divide it
        heads = next((part for part in range(hidden // head_dim, 1, -1) if not hidden % part), 1)
    keys = draft.num_key_value_heads or size_of(verifier, "num_key_value_heads") or heads
    if not option and not draft.num_key_value_heads:
        keys = math.gcd(heads, keys)
    if heads % keys:
        raise ValueError(
            f"draft.num_attention_heads ({heads}) must be a multiple of draft.num_key_value_heads ({keys})"
        )
    return {"num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": head_dim}


def describe_sizes(draft: DraftConfig, verifier: Any) -> str:
    """Return in a line what sizes a head takes, by which rule, and which options set others."""
    sizes = head_sizes(draft, verifier)
    width = "as given" if draft.intermediate_size else _width(verifier)[1]
    same = sizes["num_attention_heads"] == size_of(verifier, "num_attention_heads")
    heads = "as given" if draft.num_attention_heads else "the verifier's own" if same else "as many as the width holds"
    return (
        "MLP of {intermediate_size} ({width}; draft.intermediate_size sets it), {num_attention_heads} attention heads "
        "of {head_dim}, {num_key_value_heads} for keys and values ({heads}; draft.num_attention_heads sets it)"
    ).format(**sizes, width=width, heads=heads)


def rope_of(verifier: Any) -> dict[str, Any]:
    """Return the rotary parameters a head takes from its verifier.

    A head rotates whole head dimensions by one position: of several sets (by layer type) it takes that of full
    attention, without sections by image axis, equal on text, and partial rotation. Other kinds (longrope, dynamic) give
    way to the default one with their base.
    """
    parameters = getattr(verifier, "rope_parameters", None) or {}
    if isinstance(parameters.get("full_attention"), dict):
        parameters = parameters["full_attention"]
    rope = {key: value for key, value in parameters.items() if key not in ("mrope_section", "partial_rotary_factor")}
    if rope.get("rope_type", "default") not in ROPE_TYPES or "mrope_interleaved" in rope:
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_theta": 10000.0, "rope_type": "default", **rope}
