"""What a head's files say of its form, and what engines make of it (models/formats/engine_forms.py)."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from ...models.formats.engine_forms import ENGINES, VLLM, ServedHead, flags, obstacles
from ...models.formats.fields import EAGLE, PARTIAL, SLIDING
from ...models.formats.plain import EMBEDDING, HIDDEN_NORM, INPUT_NORM, LM_HEAD, has_qk_norm
from ...models.formats.published_config import HeadFiles, head_config
from ...models.head.architectures import EAGLE3
from .findings import Finding, findings_of

UNKNOWN_NAMES = "vLLM refuses to load them, SGLang drops them silently"
NORM_BEFORE_FC, QWEN3, _QWEN3_HEAD = "norm_before_fc", "qwen3", EAGLE3.names["qwen3"]


def form_findings(head: HeadFiles) -> Iterator[Finding]:
    """Return where files name the head's form otherwise than the engines that serve it read it."""
    values, layer, tensors, plain = head.values, head.layer, head.tensors, not head.speculators
    nested = (values.get(EAGLE) or {}).get(NORM_BEFORE_FC) if plain else None
    normed, biased = has_qk_norm(tensors), any(name.endswith(".bias") for name in tensors)
    named = [str(name) for name in values.get("architectures") or []]
    qwen3 = _QWEN3_HEAD in named if plain else layer.get("model_type") == QWEN3
    slides, window = SLIDING in (layer.get("layer_types") or []), layer.get("sliding_window")
    switch = layer.get("use_sliding_window")
    yield from findings_of(
        (plain and values.get(NORM_BEFORE_FC) and not nested, "norm_before_fc_place",
         f"norm_before_fc is {values.get(NORM_BEFORE_FC)} at the top level and {nested} in {EAGLE}",
         f"TensorRT-LLM reads it in {EAGLE} alone{'' if nested is None else ', vLLM there first'}: the norm is lost",
         f"write {EAGLE}.norm_before_fc: true too"),
        ("input_norm.weight" in tensors and not (nested or values.get(NORM_BEFORE_FC)), "norm_before_fc",
         "input_norm.weight is there, and norm_before_fc is not", "engines drop it, without an error",
         f"write norm_before_fc: true{f' at the top level and in {EAGLE}' if plain else ''}"),
        (normed and not qwen3, "qk_norm", "q_norm and k_norm are there, and config.json is that of a Llama head",
         UNKNOWN_NAMES, f"write model_type: qwen3{f', architectures: [{_QWEN3_HEAD}]' if plain else ''}"),
        (qwen3 and not normed, "qk_norm", "config.json is that of a Qwen3 head, and q_norm and k_norm are missing",
         "vLLM norms queries and keys with ones, without an error",
         f"write model_type: llama{', architectures: [LlamaForCausalLMEagle3]' if plain else ''}"),
        (biased and not layer.get("attention_bias"), "attention_bias",
         "biases are there, and attention_bias is not", "engines drop them, without an error",
         "write attention_bias: true"),
        (window and layer.get("layer_types") is None and switch is not False and layer.get("model_type") == "llama",
         "window", f"sliding_window is {window}, and there is no layer_types",
         "vLLM gives the head no window: lost on long texts, if it was trained with one",
         "write layer_types (sliding_attention or full_attention, by layer), or remove sliding_window"),
        (plain and slides and layer.get("model_type") == QWEN3 and switch is not True, "window",
         f"layer_types names a window, and use_sliding_window is {switch}", "a Qwen3 configuration forgets the window",
         "write use_sliding_window: true"),
        (plain and layer.get("partial_rotary_factor") is None and PARTIAL in (layer.get("rope_parameters") or {}),
         "partial_rotary_factor", "partial_rotary_factor stands in rope_parameters alone",
         "SGLang and TensorRT-LLM rotate all dimensions", "write it at the top level too"),
    )  # fmt: skip
    yield from _layer_findings(head)


def _layer_findings(head: HeadFiles) -> Iterator[Finding]:
    """Return what is wrong with the names of several layers, and with the norms of the later ones."""
    tensors, plain, layers = head.tensors, not head.speculators, range(1, head.layer_counts[1])
    pairs = [(f"layers.{layer}.{INPUT_NORM}", f"layers.{layer}.{HIDDEN_NORM}") for layer in layers]
    differ = [
        pair for pair in pairs if tensors.keys() >= set(pair) and not torch.equal(*(tensors[n].float() for n in pair))
    ]
    lacking = [name for ours, theirs in pairs for name in (ours, *([theirs] if plain else [])) if name not in tensors]
    return findings_of(
        (differ, "later_norms", f"{' and '.join(' differs from '.join(pair) for pair in differ)}",
         "vLLM norms with the first, SGLang and TensorRT-LLM with the second",
         "write under both names the one that the head was trained with"),
        (lacking, "later_norms", f"missing: {', '.join(lacking)}",
         "vLLM norms the input of later layers with input_layernorm, SGLang and TensorRT-LLM with hidden_norm; a "
         "missing one is all ones, without an error", "write the norm under both names"),
        (pairs and any(name.startswith("midlayer.") for name in tensors), "layer_names",
         "several layers, and the first is called midlayer", "TensorRT-LLM looks for layers.0.*",
         "call it layers.0.*"),
    )  # fmt: skip


def embedding_differs(head: HeadFiles) -> bool:
    """Return whether the head has an embedding that engines replace: of another width it has its own in all of them."""
    own = head.tensors.get(EMBEDDING)
    if own is None or head.weights is None:
        return False
    theirs = head.weights.embedding()
    wider = own.shape[-1] != theirs.shape[-1] and own.shape[-1] == head.layer.get("hidden_size")
    return not wider and (own.shape != theirs.shape or not torch.equal(own, theirs.to(own.dtype)))


def form_notes(head: HeadFiles) -> list[str]:
    """Return what engines make of the head's form; nothing if the files do not tell the form."""
    rows = head.tensors.get(LM_HEAD)
    try:
        config = head_config(head, head.verifier.vocab_size if rows is None else len(rows))
    except ValueError:  # a finding of its own
        return []
    own = EMBEDDING in head.tensors and (config.hidden_size != config.verifier_hidden_size or embedding_differs(head))
    architectures = getattr(head.verifier, "architectures", None) or []
    served = ServedHead(
        replace(config, own_embedding=own), head.verifier.num_hidden_layers, list(architectures), rows is not None
    )
    notes = []
    for engine in (VLLM,) if head.speculators else ENGINES:
        if found := obstacles(engine, served):
            notes.append(f"{engine}: cannot serve the head as it was trained: {' and '.join(found)}")
        elif needed := flags(engine, served):
            notes.append(f"{engine}: needs{needed}, or it is not served as it was trained")
    return notes
