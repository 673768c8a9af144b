"""What a published head's files alone show: fields and tensors under which engines lose acceptance.

Rules and costs are those of the engines' readers; the lengths quoted were counted in vLLM on one small head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...conf.schema import AuxNumbering, HeadImportConfig
from ...models.formats.fields import AUX_IDS, EAGLE, FIELDS, POST_NORM, TOP, vllm_layer_ids
from ...models.formats.plain import EMBEDDING, LM_HEAD
from ...models.formats.published import KNOWN
from ...models.formats.published_config import HeadFiles, rope_parameters
from ...models.formats.serving_formats import SERVING_FORMATS, ServingFormat
from ...models.head.config import rope_of
from ...models.verifier.config import default_aux_layers

PLACES = {EAGLE: f"{EAGLE}.{AUX_IDS}", TOP: f"{AUX_IDS} at the top level"}
AUX, NORM_BEFORE_RESIDUAL, NORM_OUTPUT, ROPE, PAIRS = "aux", "norm_before_residual", "norm_output", "rope", "pairs"
_LOWER = "aux states one layer lower are taken without an error (3.08 accepted in place of 3.51)"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, why it costs acceptance, and what to do about it."""

    code: str
    what: str
    cost: str
    cure: str
    suspects: str = ""  # AUX, ...: only a suspicion, which a measurement can settle


@dataclass
class Published(HeadFiles):
    """A head as it lies in its folder, and the verifier it is to serve."""

    verifier: Any  # its language-model configuration
    embedding: Tensor  # the verifier's [V, H]
    options: HeadImportConfig = field(default_factory=HeadImportConfig)  # what config.json leaves open

    @property
    def format(self) -> ServingFormat:
        """Return the format that the head is in."""
        return SERVING_FORMATS["speculators" if self.speculators else "plain"]

    def written_ids(self, layers: Iterable[int]) -> list[str]:
        """Return what config.json must say for these aux layers, by place."""
        return [f"{PLACES[at]}: {[layer + first for layer in layers]}" for at, first in self.format.first_ids.items()]

    def default_layers(self) -> list[int]:
        """Return the layers that engines take unasked; empty for a verifier too small to have them."""
        try:
            return default_aux_layers(self.verifier.num_hidden_layers)
        except ValueError:
            return []

    @property
    def names_layers(self) -> bool:
        """Return whether config.json, or the option, says on which layers the head was trained."""
        return bool(self.ids(EAGLE) or self.ids(TOP) or self.options.aux_layers)

    def aux_layers(self) -> list[int]:
        """Return the layers meant, 0-based; ids at the top level alone are taken as vLLM numbers them."""
        nested, top = self.ids(EAGLE), self.ids(TOP)
        if nested and not self.speculators:
            return nested
        if self.options.aux_numbering is AuxNumbering.zero_based and not self.speculators:
            return top
        return [k - 1 for k in top if isinstance(k, int)] or sorted(self.options.aux_layers or self.default_layers())

    def engine_layers(self) -> dict[str, list[int]]:
        """Return the 0-based layers that each engine which reads the format would take."""
        taken = {}
        for engine in self.format.engines:
            ids = next((ids for at in engine.ids_at if (ids := [k for k in self.ids(at) if isinstance(k, int)])), [])
            taken[engine.name] = [k - engine.first_id for k in ids] or self.default_layers()
        return taken


def static_findings(head: Published) -> list[Finding]:
    """Compare a head's files with its verifier and the engines' rules; every problem is named."""
    if prefix := head.prefix:
        what, cost = (
            f"the names of the tensors begin with {prefix!r}",
            "vLLM refuses to load them, SGLang drops them silently",
        )
        bare = replace(head, tensors={name.removeprefix(prefix): tensor for name, tensor in head.tensors.items()})
        return [Finding("prefixed", what, cost, f"remove {prefix!r} from the names"), *static_findings(bare)]
    rules = [_aux_findings, _field_findings, _rope_findings]
    rules += [_dtype_findings] if head.other_dtypes else [_vocabulary_findings, _tensor_findings]
    return [finding for rule in rules for finding in rule(head)]


def _aux_findings(head: Published) -> Iterator[Finding]:
    nested, top, num_layers = head.ids(EAGLE), head.ids(TOP), head.verifier.num_hidden_layers
    if not all(isinstance(k, int) for k in (*nested, *top)):
        yield Finding(
            "aux_malformed", f"{AUX_IDS} is no list of integers", "no engine can read it", "write the layers' ids"
        )
        return
    layers, default = head.aux_layers(), head.default_layers()
    write = "write " + " and ".join(head.written_ids(layers))
    taken = ", ".join(f"{engine} {ids}" for engine, ids in head.engine_layers().items())
    if len(set(layers)) < len(layers) or not all(0 <= k < num_layers for k in layers):
        cure = f"write different layers from 0 to {num_layers - 1} (0-based)"
        yield Finding("aux_out_of_range", f"the aux layers are {layers} (0-based)", "engines fail or take others", cure)
        return
    if not nested and not top:
        cost = f"engines take their default layers, {default} (0-based): lost, if the head was trained on others"
        places = " and ".join(PLACES[at] for at in head.format.first_ids)
        ask = f"ask who trained it, or measure the likely ones by head_import.aux_layers=[...]; then write {places}"
        cure = write if head.names_layers else ask
        yield Finding("aux_absent", "config.json does not say on which layers the head was trained", cost, cure)
    elif not head.speculators and not (nested and top):
        what = f"aux layer ids stand in one place only: {PLACES[EAGLE if nested else TOP]} {nested or top}"
        other = "" if nested else "; if they count from 0, write both places anew: the measurement tells"
        cost = f"engines take different layers (0-based): {taken}; {_LOWER}"
        yield Finding("aux_one_numbering", what, cost, write + other)
    elif not head.speculators and top != vllm_layer_ids(nested):
        what = f"{PLACES[EAGLE]} {nested} and {PLACES[TOP]} {top} contradict each other: the second must be one higher"
        yield Finding("aux_contradictory", what, f"engines take different layers (0-based): {taken}; {_LOWER}", write)
    elif default and layers in ([k + 1 for k in default], [k - 1 for k in default]):
        what = f"the aux layers are {layers} (0-based), one off from the usual {default}; taken are: {taken}"
        cure = (
            f"if the measurement agrees, write {vllm_layer_ids(default)} for vLLM's numbering and {default} for 0-based"
        )
        yield Finding("aux_one_off", what, f"probably ids in the other numbering: {_LOWER}", cure, AUX)
    if not head.speculators and num_layers - 1 in layers:
        what, cost = "the aux layers hold the verifier's last one", "SGLang cannot take its output"
        yield Finding("aux_last_layer", what, cost, "serve with another engine, or train on other layers")
    if head.speculators and len(layers) != 3:
        what = f"{len(layers)} aux layers in Speculators format"
        cost = "vLLM's releases (to 0.33) build fc for 3 in this format, and fail to load it"
        yield Finding("aux_count", what, cost, "`fledge import`, then `fledge export export.format=plain`")
    if not head.speculators and len(layers) != 3 and head.values.get("num_aux_hidden_states") != len(layers):
        what = f"{len(layers)} aux layers without num_aux_hidden_states"
        yield Finding("aux_count", what, "engines expect 3", f"write num_aux_hidden_states: {len(layers)}")


def _field_findings(head: Published) -> Iterator[Finding]:
    values, layer = head.values, head.layer
    if head.speculators and values.get("norm_before_residual") is None:
        cost = "vLLM takes it for true in this format: 2.09 accepted in place of 3.51 if the head was trained without"
        cure = "write norm_before_residual: false (or true, if the measurement as configured is best)"
        yield Finding("norm_before_residual_absent", "norm_before_residual is absent", cost, cure, NORM_BEFORE_RESIDUAL)
    if not head.speculators and values.get("model_type") != "llama":
        what, cost = f"model_type is {values.get('model_type')!r}", "engines read other fields for the head's sizes"
        yield Finding("model_type", what, cost, "write model_type: llama")
    if any(place.get("quantization_config") for place in (values, layer)):
        cost = "engines quantize the head, or look for scales that it has not"
        yield Finding("quantization", "quantization_config stands in config.json", cost, "remove quantization_config")
    declared, held = head.layer_counts
    if declared != held:
        what = f"num_hidden_layers is {declared}, the weights hold {held}"
        yield Finding("layer_count", what, "engines look for others than are there", f"write num_hidden_layers: {held}")
    elif held != 1:
        cost = "engines norm the input of further layers differently"
        yield Finding("layers", f"{held} draft layers", cost, "train a head of one layer")
    if (values.get(EAGLE) or {}).get(POST_NORM) and not values.get("norm_output"):
        cost = "vLLM and SGLang read norm_output at the top level alone, and feed the un-normed state onward"
        what = f"{EAGLE}.{POST_NORM}, TensorRT-LLM's name of norm_output, stands alone"
        yield Finding("norm_output_nested", what, cost, "write norm_output: true at the top level too")
    if head.options.interleaved_rotary:
        cost = "engines rotate halves of each head: q and k do not fit their positions"
        cure = "serve what `fledge import` and `fledge export` write, in which they are reordered"
        yield Finding("pairs", "q_proj and k_proj are made for pairs of neighbours (interleaved_rotary)", cost, cure)
    absent = [row.name for row in FIELDS if row.needed_by and row.name not in values]
    if absent and not head.speculators:
        cure = "write " + ", ".join(f"{name}: false" for name in absent)
        yield Finding("trtllm_fields", f"{', '.join(absent)} absent", "TensorRT-LLM reads them", cure)
    if values.get("tie_word_embeddings"):
        cost, cure = "the head's lm_head is ignored for the embedding", "write tie_word_embeddings: false"
        yield Finding("tied", "tie_word_embeddings is true", cost, cure)
    needed, found = head.verifier.max_position_embeddings, layer.get("max_position_embeddings")
    if not found or found < needed:
        what = f"max_position_embeddings is {found}, the verifier's {needed}"
        cost = "positions beyond it fail, or engines shorten the verifier's context to it"
        yield Finding("max_position_embeddings", what, cost, f"write max_position_embeddings: {needed}")


def _rope_findings(head: Published) -> Iterator[Finding]:
    theirs = rope_of(head.verifier)
    try:
        ours = rope_parameters(head.folder, head.layer)
    except ValueError as error:
        what, _, cure = str(error).rpartition(": ")
        yield Finding("rope_contradictory", what, "engines read something else, or different ones", cure)
        return
    if {name: value for name, value in ours.items() if not name.startswith("mrope_")} != theirs:  # equal on text
        cost = "lost where the head was trained on the verifier's; on short texts little of it shows"
        cure = f"if the head was trained on the verifier's, write rope_theta, rope_scaling, rope_parameters: {theirs}"
        yield Finding("rope", f"the rotary fields are {ours}, the verifier's {theirs}", cost, cure, ROPE)
    elif head.layer.get("rope_theta") is None and ours["rope_theta"] != 10000.0:
        cost = "releases of transformers before 5, and engines built on them, take 10000"
        cure = f"write rope_theta: {ours['rope_theta']} too"
        yield Finding("rope_theta_absent", "rope_parameters stands without rope_theta", cost, cure)


def absolute_ids(tensors: dict[str, Tensor], vocab_size: int) -> bool:
    """Return whether `d2t` holds target ids in place of offsets; a `t2d` that agrees with either settles it."""
    d2t, t2d = tensors["d2t"].long(), tensors.get("t2d")
    if len(d2t) == vocab_size and not bool(d2t.any()):
        return False
    inside = None if t2d is None else t2d.bool().nonzero().flatten()
    offsets = torch.arange(len(d2t)) + d2t
    if inside is not None and len(inside) == len(d2t) and torch.equal(inside, offsets):
        return False
    return bool((d2t[1:] > d2t[:-1]).all()) and 0 <= int(d2t.min()) <= int(d2t.max()) < vocab_size


def _vocabulary_findings(head: Published) -> Iterator[Finding]:
    tensors, vocab_size = head.tensors, head.verifier.vocab_size
    silent, offsets = (
        "other tokens are proposed, without an error (1.0 accepted)",
        "target id = draft id + d2t[draft id]",
    )
    size = head.values.get("draft_vocab_size")
    rows = len(tensors[LM_HEAD]) if LM_HEAD in tensors else size
    if head.shares_lm_head:
        if size is not None:
            cost = "releases of SGLang that do not know the field take random weights, without an error (1.0 accepted)"
            cure = "write draft_vocab_size: null"
            yield Finding("lm_head_shared", "reuse_target_lm_head stands for a missing lm_head", cost, cure)
        return
    if size is None:
        what = "draft_vocab_size is absent" if "draft_vocab_size" not in head.values else "draft_vocab_size is null"
        cost = "SGLang reads it without a default, and takes the verifier's lm_head for null"
        yield Finding("draft_vocab_size", what, cost, f"write draft_vocab_size: {rows or 'the rows of lm_head'}")
    elif rows != size:
        what = f"draft_vocab_size is {size}, {LM_HEAD} has {rows} rows"
        yield Finding("draft_vocab_size", what, "engines fail to load, or cut it", f"write draft_vocab_size: {rows}")
    if LM_HEAD not in tensors:
        cost = "vLLM and TensorRT-LLM take the verifier's, SGLang random weights, without an error (1.0 accepted)"
        yield Finding("lm_head_absent", f"{LM_HEAD} [{size or vocab_size}, H] is missing", cost, head.lm_head_cure)
    if "d2t" not in tensors:
        if (rows or vocab_size) < vocab_size:
            cure = (
                "ship d2t, int64 offsets: " + offsets + (" (t2d holds what it is made of)" if "t2d" in tensors else "")
            )
            yield Finding("d2t_absent", "d2t is missing, and the draft vocabulary is reduced", silent, cure)
        return
    d2t = tensors["d2t"].long().flatten()
    ids = torch.arange(len(d2t)) + d2t
    if absolute_ids(tensors, vocab_size):
        cost = "index errors, or " + silent
        yield Finding("d2t_absolute", "d2t holds target ids", cost, f"subtract 0, 1, 2 ... from it: {offsets}")
    elif len(d2t) == vocab_size:
        cost, cure = "vLLM refuses to load it", "remove d2t and t2d"
        yield Finding("d2t_full", "d2t is shipped with a full vocabulary", cost, cure)
    elif not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        what = f"d2t gives target ids from {int(ids.min())} to {int(ids.max())}, the verifier has {vocab_size}"
        yield Finding("d2t_out_of_range", what, "index errors, or " + silent, f"make d2t anew: {offsets}")
    elif "t2d" in tensors and not torch.equal(tensors["t2d"].bool().nonzero().flatten(), ids.sort().values):
        what = "d2t and t2d name different tokens"
        yield Finding(
            "maps_contradictory", what, f"if d2t is wrong, {silent}", "remove t2d if d2t is right: engines skip it"
        )


def _dtype_findings(head: Published) -> Iterator[Finding]:
    cost = "engines read them by scales and a quantization_config of the head's own, or as plain numbers; not measured"
    yield Finding("dtype", "; ".join(head.other_dtypes[:5]), cost, "fetch the head unquantised, in bfloat16")


def _tensor_findings(head: Published) -> Iterator[Finding]:
    broken = [name for name, tensor in head.tensors.items() if not tensor.isfinite().all()]
    if broken:
        what = f"{len(broken)} tensors hold numbers that are not finite: {', '.join(sorted(broken)[:5])}"
        yield Finding("not_finite", what, "nothing is accepted (1.0)", "train the head again, from before it diverged")
    prefixed = [name for name in head.tensors if name.startswith("model.")]
    unknown = [name for name in head.tensors if name not in prefixed and not KNOWN.fullmatch(name)]
    if not (head.values.get("fc_norm") or head.values.get("use_aux_norm")):
        unknown += [name for name in head.tensors if name.startswith("fc_norm.")]
    for code, names, cure in (
        ("prefixed", prefixed, "remove `model.` from the names"),
        ("unknown_tensors", unknown, "remove them, or set the field that declares them"),
    ):
        if names:
            what = f"{len(names)} tensors that engines do not know: {', '.join(sorted(names)[:5])}"
            yield Finding(code, what, "vLLM refuses to load them, SGLang drops them silently", cure)
    own, theirs = head.tensors.get(EMBEDDING), head.embedding
    if own is not None and own.shape[-1] != theirs.shape[-1] and own.shape[-1] == head.layer.get("hidden_size"):
        return  # a head of another width has an embedding of its own, in every engine
    if own is not None and (own.shape != theirs.shape or not torch.equal(own, theirs.to(own.dtype))):
        cost = "SGLang and TensorRT-LLM replace it by the verifier's: lost there, if it was trained"
        cure = "serve it in vLLM only; if the verifier is not the one the head was trained for, set that one"
        yield Finding("embedding", f"{EMBEDDING} differs from the verifier's", cost, cure)


def engine_notes(head: Published, trained: list[int] | None = None) -> list[str]:
    """Return what each engine makes of the head, and the settings without which it would lose acceptance.

    Args:
        trained: the aux layers it was trained on if measured; otherwise those that the files mean.
    """
    layers = trained or (head.aux_layers() if head.names_layers else None)
    named = layers or "the layers it was trained on, which config.json does not say"
    taken = {engine: _taken(engine, ids, layers) for engine, ids in head.engine_layers().items()}
    if head.speculators:
        notes = [taken["vLLM"] if len(head.aux_layers()) == 3 else "vLLM: fails to load it, its fc is for 3 aux layers"]
        notes.append(
            "SGLang, TensorRT-LLM: do not read this format, `fledge import` and `fledge export` give the plain one"
        )
    else:
        notes = [taken["vLLM"] + "; top-level ids win over nested ones"]
        notes.append(taken["SGLang"] + "; it reads the nested ids alone")
        notes.append(
            "SGLang: beside an explicit --quantization add --speculative-draft-model-quantization unquant, or the head "
            "is quantized too"
        )
        notes.append(f"TensorRT-LLM: ignores ids in the checkpoint, its YAML needs eagle3_layers_to_capture: {named}")
        if head.values.get("norm_before_residual"):
            notes.append("SGLang, TensorRT-LLM: ignore norm_before_residual, acceptance is lost if it was trained so")
    if head.values.get("fc_norm") or head.values.get("norm_output"):
        notes.append("every engine: releases that do not know fc_norm and norm_output (EAGLE-3.1) lose acceptance")
    return notes


def _taken(engine: str, taken: list[int], layers: list[int] | None) -> str:
    verdict = "the right ones" if taken == layers else f"NOT {layers}: acceptance is lost"
    unknown = "its default: config.json does not say whether they are right"
    return f"{engine}: takes layers {taken} (0-based), {verdict if layers else unknown}"
