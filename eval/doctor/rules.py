"""What a published head's files alone show: fields and tensors under which engines lose acceptance.

Rules and costs are those of the engines' readers; the lengths quoted were counted in vLLM on one small head.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...models.formats.fields import AUX_IDS, EAGLE, FIELDS, LAYER, PARTIAL, POST_NORM, TOP, vllm_layer_ids
from ...models.formats.plain import EMBEDDING, LM_HEAD, has_qk_norm, other_dtypes
from ...models.formats.published_config import GPT_OSS, HeadFiles, rope_parameters
from ...models.formats.serving_formats import SERVING_FORMATS, ServingFormat
from ...models.head.config import rope_of
from .findings import Finding, findings_of
from .form_rules import QWEN3, UNKNOWN_NAMES, embedding_differs, form_findings, form_notes

PLACES = {EAGLE: f"{EAGLE}.{AUX_IDS}", TOP: f"{AUX_IDS} at the top level"}
AUX, NORM_BEFORE_RESIDUAL, NORM_OUTPUT, ROPE, PAIRS = "aux", "norm_before_residual", "norm_output", "rope", "pairs"
KNOWN_TENSORS = re.compile(
    r"(fc|norm|lm_head|embed_tokens|input_norm|fc_norm\.\d+)\.weight|d2t|t2d|(midlayer|layers\.\d+)\."
    r"((input_layernorm|hidden_norm|post_attention_layernorm|self_attn\.([qkvo]_proj|[qk]_norm)"
    r"|mlp\.(gate|up|down)_proj)\.weight|self_attn\.[qkvo]_proj\.bias)"
)
_LOWER = "aux states one layer lower are taken without an error (3.08 accepted in place of 3.51)"


def _format(head: HeadFiles) -> ServingFormat:
    return SERVING_FORMATS["speculators" if head.speculators else "plain"]


def written_ids(head: HeadFiles, layers: Iterable[int]) -> list[str]:
    """Return what config.json must say for these aux layers, by place."""
    return [f"{PLACES[at]}: {[layer + first for layer in layers]}" for at, first in _format(head).first_ids.items()]


def engine_layers(head: HeadFiles) -> dict[str, list[int]]:
    """Return the 0-based layers that each engine which reads the format would take."""
    taken = {}
    for engine in _format(head).engines:
        ids = next((ids for at in engine.ids_at if (ids := [k for k in head.ids(at) if isinstance(k, int)])), [])
        first = 1 if head.counts_boundaries else engine.first_id
        taken[engine.name] = [k - first for k in ids] or head.default_layers()
    return taken


def static_findings(head: HeadFiles) -> list[Finding]:
    """Compare a head's files with its verifier and the engines' rules; every problem is named."""
    if prefix := head.prefix:
        what = f"the names of the tensors begin with {prefix!r}"
        finding = Finding("prefixed", what, UNKNOWN_NAMES, f"remove {prefix!r} from the names")
        bare = replace(head, tensors={name.removeprefix(prefix): tensor for name, tensor in head.tensors.items()})
        return [finding, *static_findings(bare)]
    if others := other_dtypes(head.tensors):
        cost = (
            "engines read them by scales and a quantization_config of the head's own, or as plain numbers; not measured"
        )
        of_tensors = [Finding("dtype", "; ".join(others[:5]), cost, "fetch the head unquantised, in bfloat16")]
    else:
        of_tensors = [*_vocabulary_findings(head), *_tensor_findings(head)]
    of_fields = [*_field_findings(head), *form_findings(head), *_rope_findings(head)]
    return [*_aux_findings(head), *of_fields, *of_tensors]


def _aux_findings(head: HeadFiles) -> Iterator[Finding]:
    nested, top, num_layers = head.ids(EAGLE), head.ids(TOP), head.verifier.num_hidden_layers
    if not all(isinstance(k, int) for k in (*nested, *top)):
        what, cost = f"{AUX_IDS} is no list of integers", "no engine can read it"
        yield Finding("aux_malformed", what, cost, "write the layers' ids")
        return
    layers, default, plain = head.aux_layers(), head.default_layers(), not head.speculators
    if len(set(layers)) < len(layers) or not all(0 <= k < num_layers for k in layers):
        cure = f"write different layers from 0 to {num_layers - 1} (0-based)"
        yield Finding("aux_out_of_range", f"the aux layers are {layers} (0-based)", "engines fail or take others", cure)
        return
    write = "write " + " and ".join(written_ids(head, layers))
    places = " and ".join(PLACES[at] for at in _format(head).first_ids)
    ask = f"ask who trained it, or measure the likely ones by head_import.aux_layers=[...]; then write {places}"
    taken = ", ".join(f"{engine} {ids}" for engine, ids in engine_layers(head).items())
    differ = f"engines take different layers (0-based): {taken}; {_LOWER}"
    anew = "" if nested else "; if they count from 0, write both places anew: the measurement tells"
    numbering = findings_of(
        (not nested and not top, "aux_absent", "config.json does not say on which layers the head was trained",
         f"engines take their default layers, {default} (0-based): lost, if the head was trained on others",
         write if head.names_layers else ask),
        (plain and not (nested and top) and not head.counts_boundaries, "aux_one_numbering",
         f"aux layer ids stand in one place only: {PLACES[EAGLE if nested else TOP]} {nested or top}", differ,
         write + anew),
        (plain and nested and top and top != vllm_layer_ids(layers), "aux_contradictory",
         f"{PLACES[EAGLE]} {nested} and {PLACES[TOP]} {top} contradict each other: the second must be one higher",
         differ, write),
        (default and layers in ([k + 1 for k in default], [k - 1 for k in default]), "aux_one_off",
         f"the aux layers are {layers} (0-based), one off from the usual {default}; taken are: {taken}",
         f"probably ids in the other numbering: {_LOWER}",
         f"if the measurement agrees, write {vllm_layer_ids(default)} for vLLM's numbering and {default} for 0-based",
         AUX),
    )  # fmt: skip
    yield from itertools.islice(numbering, 1)
    uncounted = len(layers) != 3 and head.layer.get("num_aux_hidden_states") != len(layers)
    count = f"{len(layers)} aux layers without num_aux_hidden_states"
    yield from findings_of(
        (plain and num_layers - 1 in layers and head.verifier.model_type != GPT_OSS, "aux_last_layer",
         "the aux layers hold the verifier's last one",
         "SGLang cannot take its output", "serve with another engine, or train on other layers"),
        (uncounted and plain, "aux_count", count, "engines expect 3", f"write num_aux_hidden_states: {len(layers)}"),
        (uncounted and not plain and head.layer.get("model_type") != QWEN3, "aux_count", count,
         "vLLM builds fc for 3, and fails to load it", f"write {LAYER}.num_aux_hidden_states: {len(layers)}"),
    )  # fmt: skip


def _field_findings(head: HeadFiles) -> Iterator[Finding]:
    values, layer, plain = head.values, head.layer, not head.speculators
    declared, held = head.layer_counts
    absent = [row.name for row in FIELDS if row.needed_by and row.name not in values]
    needed, positions = head.verifier.max_position_embeddings, layer.get("max_position_embeddings")
    nested_alone = (values.get(EAGLE) or {}).get(POST_NORM) and not values.get("norm_output")
    return findings_of(
        (not plain and values.get("norm_before_residual") is None, "norm_before_residual_absent",
         "norm_before_residual is absent",
         "vLLM takes it for true in this format: 2.09 accepted in place of 3.51 if the head was trained without",
         "write norm_before_residual: false (or true, if the measurement as configured is best)", NORM_BEFORE_RESIDUAL),
        (plain and values.get("model_type") not in ("llama", *([QWEN3] if has_qk_norm(head.tensors) else [])),
         "model_type", f"model_type is {values.get('model_type')!r}",
         "engines read other fields for the head's sizes", "write model_type: llama"),
        (any(place.get("quantization_config") for place in (values, layer)), "quantization",
         "quantization_config stands in config.json", "engines quantize the head, or look for scales that it has not",
         "remove quantization_config"),
        (declared != held, "layer_count", f"num_hidden_layers is {declared}, the weights hold {held}",
         "engines look for others than are there", f"write num_hidden_layers: {held}"),
        (nested_alone, "norm_output_nested", f"{EAGLE}.{POST_NORM}, TensorRT-LLM's name of norm_output, stands alone",
         "vLLM and SGLang read norm_output at the top level alone, and feed the un-normed state onward",
         "write norm_output: true at the top level too"),
        (head.options.interleaved_rotary, "pairs",
         "q_proj and k_proj are made for pairs of neighbours (interleaved_rotary)",
         "engines rotate halves of each head: q and k do not fit their positions",
         "serve what `fledge import` and `fledge export` write, in which they are reordered"),
        (plain and absent, "trtllm_fields", f"{', '.join(absent)} absent", "TensorRT-LLM reads them",
         "write " + ", ".join(f"{name}: false" for name in absent)),
        (values.get("tie_word_embeddings"), "tied", "tie_word_embeddings is true",
         "the head's lm_head is ignored for the embedding", "write tie_word_embeddings: false"),
        (not positions or positions < needed, "max_position_embeddings",
         f"max_position_embeddings is {positions}, the verifier's {needed}",
         "positions beyond it fail, or engines shorten the verifier's context to it",
         f"write max_position_embeddings: {needed}"),
    )  # fmt: skip


def _rope_findings(head: HeadFiles) -> Iterator[Finding]:
    theirs = rope_of(head.verifier)
    try:
        ours = rope_parameters(head.folder, head.layer)
    except ValueError as error:
        what, _, cure = str(error).rpartition(": ")
        return iter([Finding("rope_contradictory", what, "engines read something else, or different ones", cure)])
    # Sections by image axis are equal on text; `theirs` is of the whole of each head's dimensions.
    kept = {name: value for name, value in ours.items() if not name.startswith("mrope_") and name != PARTIAL}
    differs = kept != theirs
    old_absent = head.layer.get("rope_theta") is None and ours["rope_theta"] != 10000.0
    return findings_of(
        (differs, "rope", f"the rotary fields are {ours}, the verifier's {theirs}",
         "lost where the head was trained on the verifier's; on short texts little of it shows",
         f"if the head was trained on the verifier's, write rope_theta, rope_scaling, rope_parameters: {theirs}", ROPE),
        (old_absent and not differs, "rope_theta_absent", "rope_parameters stands without rope_theta",
         "releases of transformers before 5, and engines built on them, take 10000",
         f"write rope_theta: {ours['rope_theta']} too"),
    )  # fmt: skip


def absolute_ids(tensors: dict[str, Tensor], vocab_size: int) -> bool:
    """Return whether `d2t` holds target ids in place of offsets; a `t2d` that agrees with either settles it."""
    d2t, t2d = tensors["d2t"].long(), tensors.get("t2d")
    if t2d is not None and torch.equal(t2d.bool().nonzero().flatten(), torch.arange(len(d2t)) + d2t):
        return False
    return bool((d2t[1:] > d2t[:-1]).all()) and 0 <= int(d2t.min()) <= int(d2t.max()) < vocab_size


def _vocabulary_findings(head: HeadFiles) -> Iterator[Finding]:
    tensors, size, shared = head.tensors, head.values.get("draft_vocab_size"), head.shares_lm_head
    rows = len(tensors[LM_HEAD]) if LM_HEAD in tensors else size
    yield from findings_of(
        (shared and size is not None, "lm_head_shared", "reuse_target_lm_head stands for a missing lm_head",
         "releases of SGLang that do not know the field take random weights, without an error (1.0 accepted)",
         "write draft_vocab_size: null"),
        (not shared and size is None, "draft_vocab_size",
         f"draft_vocab_size is {'null' if 'draft_vocab_size' in head.values else 'absent'}",
         "SGLang reads it without a default, and takes the verifier's lm_head for null",
         f"write draft_vocab_size: {rows or 'the rows of lm_head'}"),
        (not shared and size is not None and rows != size, "draft_vocab_size",
         f"draft_vocab_size is {size}, {LM_HEAD} has {rows} rows", "engines fail to load, or cut it",
         f"write draft_vocab_size: {rows}"),
        (not shared and LM_HEAD not in tensors, "lm_head_absent",
         f"{LM_HEAD} [{size or head.verifier.vocab_size}, H] is missing",
         "vLLM and TensorRT-LLM take the verifier's, SGLang random weights, without an error (1.0 accepted)",
         head.lm_head_cure),
    )  # fmt: skip
    if not shared:
        yield from itertools.islice(_map_findings(head, rows), 1)


def _map_findings(head: HeadFiles, rows: int | None) -> Iterator[Finding]:
    """Return what is wrong with the vocabulary maps; the first counts."""
    tensors, vocab_size = head.tensors, head.verifier.vocab_size
    silent = "other tokens are proposed, without an error (1.0 accepted)"
    offsets = "target id = draft id + d2t[draft id]"
    if "d2t" not in tensors:
        made_of = " (t2d holds what it is made of)" if "t2d" in tensors else ""
        return findings_of(
            ((rows or vocab_size) < vocab_size, "d2t_absent", "d2t is missing, and the draft vocabulary is reduced",
             silent, f"ship d2t, int64 offsets: {offsets}{made_of}"),
        )  # fmt: skip
    d2t, t2d = tensors["d2t"].long().flatten(), tensors.get("t2d")
    ids = torch.arange(len(d2t)) + d2t
    low, high = int(ids.min()), int(ids.max())
    return findings_of(
        (absolute_ids(tensors, vocab_size), "d2t_absolute", "d2t holds target ids", f"index errors, or {silent}",
         f"subtract 0, 1, 2 ... from it: {offsets}"),
        (len(d2t) == vocab_size, "d2t_full", "d2t is shipped with a full vocabulary", "vLLM refuses to load it",
         "remove d2t and t2d"),
        (not 0 <= low <= high < vocab_size, "d2t_out_of_range",
         f"d2t gives target ids from {low} to {high}, the verifier has {vocab_size}", f"index errors, or {silent}",
         f"make d2t anew: {offsets}"),
        (t2d is not None and not torch.equal(t2d.bool().nonzero().flatten(), ids.sort().values), "maps_contradictory",
         "d2t and t2d name different tokens", f"if d2t is wrong, {silent}",
         "remove t2d if d2t is right: engines skip it"),
    )  # fmt: skip


def _tensor_findings(head: HeadFiles) -> Iterator[Finding]:
    tensors, normed = head.tensors, head.values.get("fc_norm") or head.values.get("use_aux_norm")
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    prefixed = [name for name in tensors if name.startswith("model.")]
    unknown = [name for name in tensors if name not in prefixed and not KNOWN_TENSORS.fullmatch(name)]
    unknown += [name for name in tensors if name.startswith("fc_norm.") and not normed]

    def named(names: list[str], what: str) -> str:
        return f"{len(names)} tensors {what}: {', '.join(sorted(names)[:5])}"

    return findings_of(
        (broken, "not_finite", named(broken, "hold numbers that are not finite"), "nothing is accepted (1.0)",
         "train the head again, from before it diverged"),
        (prefixed, "prefixed", named(prefixed, "that engines do not know"), UNKNOWN_NAMES,
         "remove `model.` from the names"),
        (unknown, "unknown_tensors", named(unknown, "that engines do not know"), UNKNOWN_NAMES,
         "remove them, or set the field that declares them"),
        (embedding_differs(head), "embedding", f"{EMBEDDING} differs from the verifier's",
         "SGLang and TensorRT-LLM replace it by the verifier's: lost there, if it was trained",
         "serve it in vLLM only; if the verifier is not the one the head was trained for, set that one"),
    )  # fmt: skip


def engine_notes(head: HeadFiles, trained: list[int] | None = None) -> list[str]:
    """Return what each engine makes of the head, and the settings without which it would lose acceptance.

    `trained` are the aux layers it was trained on, if measured; otherwise those count that the files mean.
    """
    layers = trained or (head.aux_layers() if head.names_layers else None)
    named = layers or "the layers it was trained on, which config.json does not say"
    taken = {}
    for engine, ids in engine_layers(head).items():
        verdict = "the right ones" if ids == layers else f"NOT {layers}: acceptance is lost"
        verdict = verdict if layers else "its default: config.json does not say whether they are right"
        taken[engine] = f"{engine}: takes layers {ids} (0-based), {verdict}"
    if head.speculators:
        notes = [
            taken["vLLM"],
            "SGLang, TensorRT-LLM: do not read this format, `fledge import` and `fledge export` give the plain one",
        ]
    else:
        notes = [
            taken["vLLM"] + "; top-level ids win over nested ones",
            taken["SGLang"] + "; it reads the nested ids alone",
            "SGLang: beside an explicit --quantization add --speculative-draft-model-quantization unquant, or the head "
            "is quantized too",
            f"TensorRT-LLM: ignores ids in the checkpoint, its YAML needs eagle3_layers_to_capture: {named}",
        ]
    notes += form_notes(head)
    if head.values.get("fc_norm") or head.values.get("norm_output"):
        notes.append("every engine: releases that do not know fc_norm and norm_output (EAGLE-3.1) lose acceptance")
    return notes
