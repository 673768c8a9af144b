"""A published head put together for measuring, with everything corrected whose cure leaves no choice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...conf.schema import HeadImportConfig
from ...models.formats.plain import LM_HEAD, vllm_layer_ids
from ...models.formats.published import KNOWN, assemble_head, layer_counts, wrapper_prefix
from ...models.head.draft_head import DraftHead
from ...models.verifier.model import VerifierWeights
from .rules import IDS, Published, absolute_ids


def readable_head(head: Published, weights: VerifierWeights) -> DraftHead:
    """Put the head together.

    Raises:
        ValueError: what is wrong cannot be corrected without a choice.
    """
    tensors = _corrected_tensors(head, weights)
    values = _corrected_config(head, tensors)
    options = HeadImportConfig(interleaved_rotary=head.options.interleaved_rotary)  # the layers are in the values now
    return assemble_head(head.folder, values, tensors, head.verifier, options, weights).head


def _corrected_tensors(head: Published, weights: VerifierWeights) -> dict[str, Tensor]:
    prefix = wrapper_prefix(head.tensors) or "model."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in head.tensors.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if KNOWN.fullmatch(name)}
    vocab_size = head.verifier.vocab_size
    if "d2t" not in tensors and "t2d" in tensors:
        inside = tensors["t2d"].bool().nonzero().flatten()
        tensors["d2t"] = inside - torch.arange(len(inside))
    if "d2t" in tensors:
        if absolute_ids(tensors, vocab_size):
            tensors["d2t"] = tensors["d2t"].long() - torch.arange(len(tensors["d2t"]))
        tensors.pop("t2d", None)  # it follows from d2t
        if len(tensors["d2t"]) == vocab_size:
            del tensors["d2t"]
    if LM_HEAD not in tensors:  # then trained on the verifier's, or lost
        d2t = tensors.get("d2t")
        ids = torch.arange(vocab_size) if d2t is None else torch.arange(len(d2t)) + d2t
        if int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            tensors[LM_HEAD] = weights.lm_head()[ids]
    return tensors


def _corrected_config(head: Published, tensors: dict[str, Tensor]) -> dict[str, Any]:
    layers, num_layers = head.aux_layers(), head.verifier.num_hidden_layers
    if not layers or not all(isinstance(k, int) and 0 <= k < num_layers for k in layers):
        layers = head.default_layers()
    layer = {name: value for name, value in head.layer.items() if name not in ("quantization_config", IDS)}
    layer["num_hidden_layers"] = layer_counts(head.values, tensors)[1]
    if (rope := layer.get("rope_parameters")) and "rope_theta" in rope:
        layer["rope_theta"] = rope["rope_theta"]
    if head.speculators:
        values = {**head.values, "transformer_layer_config": layer, IDS: vllm_layer_ids(layers)}
        values.pop("eagle_config", None)
    else:
        values = {**layer, "eagle_config": {**(head.values.get("eagle_config") or {}), IDS: layers}}
    values.pop("quantization_config", None)
    values["draft_vocab_size"] = len(tensors[LM_HEAD]) if LM_HEAD in tensors else None
    values["fc_norm"] = any(name.startswith("fc_norm.") for name in tensors)
    return values
