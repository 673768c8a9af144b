"""The sizes of a draft head, from the options and from whatever the verifier's configuration calls its own.

A head is a dense Llama, and its verifier may be anything. Its MLP is as wide as the verifier's `intermediate_size`.
Where that is one expert's width, or narrower than the state beside experts, it is as wide as the experts that a token
meets are together, shared ones among them. Attention has the verifier's heads; where their number does not divide the
width, which a Llama must, as many of the same size as the width holds.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError

from ...conf.schema import DraftConfig

# What configurations of transformers call these; the first that is there counts.
_ACTIVE = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
_DENSE_WIDTH = ("intermediate_size_mlp", "intermediate_size", "ffn_hidden_size", "ffn_dim")
_SHARED_WIDTH = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


class HeadSizes(NamedTuple):
    """Widths and counts of a head's layers."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def size_of(verifier: Any, *names: str) -> Any:
    """Give the first of these sizes that a configuration has, else None; of one that layers differ in, the commonest.

    (transformers refuses to give some of the latter, by an error that getattr does not take for a missing attribute.)
    """
    for name in names:
        try:
            value = getattr(verifier, name, None)
        except AmbiguousGlobalPerLayerAttributeError:
            value = [getattr(layer, name, None) for layer in verifier.per_layer_config]
        if isinstance(value, list | tuple):
            value = Counter(value).most_common(1)[0][0] if value else None
        if value is not None:
            return value
    return None


def required_size(verifier: Any, name: str, cure: str) -> int:
    """Give a size that a head cannot do without.

    Raises:
        ValueError: the verifier's configuration has none of that name.
    """
    value = size_of(verifier, name)
    if value is None:
        raise ValueError(f"verifier.path: config.json of {verifier.model_type} has no {name}: {cure}")
    return int(value)


def num_active_experts(verifier: Any) -> int:
    """Give how many routed experts a token meets in a layer; 0: the verifier has none."""
    return int(size_of(verifier, *_ACTIVE) or 0) if num_experts(verifier) > 1 else 0


def num_experts(verifier: Any) -> int:
    """Give how many routed experts a layer has."""
    return int(size_of(verifier, *_EXPERTS) or 0)


def head_sizes(draft: DraftConfig, verifier: Any) -> HeadSizes:
    """Derive the sizes of a head.

    Raises:
        ValueError: an option does not fit, or is required because nothing says what it is; names it.
    """
    hidden = draft.hidden_size or required_size(verifier, "hidden_size", "fledge cannot derive a head from it")
    heads, keys, head_dim = _attention(draft, verifier, hidden)
    return HeadSizes(hidden, draft.intermediate_size or _width(verifier)[0], heads, keys, head_dim)


def _width(verifier: Any) -> tuple[int, str]:
    """Give the width of the head's MLP, and what it is."""
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


def _attention(draft: DraftConfig, verifier: Any, hidden: int) -> tuple[int, int, int]:
    """Give the number of heads, of those of keys and values, and their size."""
    given, theirs = draft.num_attention_heads, size_of(verifier, "num_attention_heads")
    head_dim = draft.head_dim or size_of(verifier, "head_dim")
    if not theirs and not (given and head_dim):
        raise ValueError(
            f"draft.num_attention_heads and draft.head_dim are required: config.json of {verifier.model_type} has no "
            "num_attention_heads"
        )
    head_dim = head_dim or size_of(verifier, "hidden_size") // theirs
    if head_dim % 2:
        raise ValueError(f"draft.head_dim must be even, rotation takes dimensions in pairs, got {head_dim}")
    if given and hidden % given:
        raise ValueError(
            f"draft.num_attention_heads must divide the head's width of {hidden}, or no engine reads it, got {given}"
        )
    heads = given or (theirs if not hidden % theirs else _divisor(hidden, hidden // head_dim))
    keys = draft.num_key_value_heads or size_of(verifier, "num_key_value_heads") or heads
    if not given and not draft.num_key_value_heads:
        keys = math.gcd(heads, keys)
    if heads % keys:
        raise ValueError(
            f"draft.num_attention_heads ({heads}) must be a multiple of draft.num_key_value_heads ({keys})"
        )
    return heads, keys, head_dim


def _divisor(number: int, most: int) -> int:
    """Give the largest divisor up to `most`, at least 1."""
    return next((part for part in range(most, 1, -1) if number % part == 0), 1)


def describe_sizes(draft: DraftConfig, verifier: Any) -> str:
    """Say in a line what sizes a head takes, by which rule, and which options set others."""
    sizes = head_sizes(draft, verifier)
    width = "as given" if draft.intermediate_size else _width(verifier)[1]
    same = sizes.num_attention_heads == size_of(verifier, "num_attention_heads")
    heads = "as given" if draft.num_attention_heads else "the verifier's own" if same else "as many as the width holds"
    return (
        f"MLP of {sizes.intermediate_size} ({width}; draft.intermediate_size sets it), {sizes.num_attention_heads} "
        f"attention heads of {sizes.head_dim}, {sizes.num_key_value_heads} for keys and values ({heads}; "
        "draft.num_attention_heads sets it)"
    )
