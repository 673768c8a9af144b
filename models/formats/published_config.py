"""The config.json of heads as other projects publish them, in plain or Speculators format, read strictly.

Every field is represented, known to have no effect, or refused by name, at every level; null is the same as absent.
"""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...conf.schema import AuxNumbering, HeadImportConfig
from ..head.architectures import named_architecture
from ..head.config import DraftHeadConfig
from ..verifier.config import default_aux_layers
from ..verifier.weights import VerifierWeights
from .fields import (
    AUX_IDS,
    EAGLE,
    FIELDS,
    FULL,
    LAYER,
    PARTIAL,
    POST_NORM,
    ROPE_FIELDS,
    SLIDING,
    TOP,
    Field,
    has_no_effect,
    vllm_layer_ids,
    window_of,
)
from .plain import CONFIG, LM_HEAD, has_qk_norm

_LAYER = re.compile(r"(midlayer|layers\.\d+)\.")
_OF_ANY_LENGTH = ("default", "linear", "llama3")  # rotations that do not depend on max_position_embeddings
_CURE = "serve the head in the engine it was made for, or correct the field if it was trained otherwise"
GPT_OSS = "gpt_oss"  # a verifier's model_type
_ROPE_ALIASES = {"mrope": "default", "su": "longrope"}  # equal on text, and an older name


@dataclass
class HeadFiles:
    """A published head as it lies in its folder, and the verifier it is to serve."""

    folder: Path
    values: dict[str, Any]  # config.json
    tensors: dict[str, Tensor]
    verifier: Any  # its language-model configuration, which the head must fit
    options: HeadImportConfig  # what config.json leaves open
    weights: VerifierWeights | None  # for what a head shares with it

    @property
    def speculators(self) -> bool:
        """Return whether the head is in Speculators format; if not, it is in the plain one."""
        return "speculators_model_type" in self.values

    @property
    def layer(self) -> dict[str, Any]:
        """Return the fields of the layer: of a plain head, all; `head_config` refuses what is no object."""
        layer = self.values.get(LAYER) if self.speculators else self.values
        return layer if isinstance(layer, dict) else {}

    def ids(self, place: str) -> list[Any]:
        """Return the aux layer ids at one of their two places, ascending; empty if there are none."""
        fields = self.values.get(EAGLE) if place == EAGLE else self.values
        found = (fields.get(AUX_IDS) if isinstance(fields, dict) else None) or []
        if not isinstance(found, list):
            return [found]
        return sorted(found) if all(isinstance(k, int) for k in found) else found

    @property
    def counts_boundaries(self) -> bool:
        """Return whether nested ids are vLLM's: those of gpt-oss are, if one is as high as its number of layers."""
        return self.verifier.model_type == GPT_OSS and self.ids(EAGLE)[-1:] == [self.verifier.num_hidden_layers]

    @property
    def names_layers(self) -> bool:
        """Return whether config.json, or the option, says on which layers the head was trained."""
        return bool(self.ids(EAGLE) or self.ids(TOP) or self.options.aux_layers)

    def default_layers(self) -> list[int]:
        """Return the layers that engines take unasked; empty for a verifier too small to have them."""
        try:
            return default_aux_layers(self.verifier.num_hidden_layers)
        except ValueError:
            return []

    def aux_layers(self) -> list[int]:
        """Return the layers meant, 0-based; ids at the top level alone are taken as vLLM numbers them."""
        nested, top = self.ids(EAGLE), self.ids(TOP)
        if nested and not self.speculators:
            return [k - 1 for k in nested if isinstance(k, int)] if self.counts_boundaries else nested
        if self.options.aux_numbering is AuxNumbering.zero_based and not self.speculators:
            return top
        return [k - 1 for k in top if isinstance(k, int)] or sorted(self.options.aux_layers or self.default_layers())

    @property
    def prefix(self) -> str:
        """Return what stands before the names of the tensors, by fc.weight, which every head has; mostly empty."""
        names = [name.removesuffix("fc.weight") for name in self.tensors if name.endswith(".fc.weight")]
        return names[0] if len(names) == 1 and "fc.weight" not in self.tensors else ""

    @property
    def layer_counts(self) -> tuple[int, int]:
        """Return the number of layers by config.json and by the names of the tensors."""
        names = (re.sub(r"^midlayer\.", "layers.0.", name) for name in self.tensors if _LAYER.match(name))
        return self.layer.get("num_hidden_layers") or 1, len({name.split(".")[1] for name in names})

    @property
    def shares_lm_head(self) -> bool:
        """Return whether the head declares the verifier's lm_head, of its whole vocabulary, as its own."""
        size = self.values.get("draft_vocab_size", 0)
        whole = size is None or (bool(self.values.get("reuse_target_lm_head")) and size == self.layer.get("vocab_size"))
        return LM_HEAD not in self.tensors and whole

    @property
    def lm_head_cure(self) -> str:
        """Return what to do about a head without lm_head."""
        declare = ", or, if it was trained on the verifier's own, say so by draft_vocab_size: null in config.json"
        whole = self.values.get("draft_vocab_size") in (None, self.layer.get("vocab_size"))
        return "fetch the head's complete checkpoint" + (declare if whole else "")


def head_config(files: HeadFiles, lm_head_rows: int) -> DraftHeadConfig:
    """Read either format's config.json; `lm_head_rows` is the draft vocabulary if it does not name its size.

    ValueError: a field is missing, unknown, contradicts another, or says what fledge's head cannot represent.
    """
    folder, values, layer, verifier = files.folder, files.values, files.layer, files.verifier
    architecture = named_architecture(values)
    fields = {field.name: field for field in (*FIELDS, *architecture.fields)}
    _check_fields(files, fields)
    absent = [f.name for f in FIELDS if f.required and (not isinstance(layer.get(f.name), int) or layer[f.name] < 1)]
    if absent:
        raise ValueError(f"{folder / CONFIG} has no usable {', '.join(absent)}: fetch the head again")
    width = values.get("target_hidden_size") or layer["hidden_size"]
    for name, has, needs in (
        ("vocab_size", layer["vocab_size"], verifier.vocab_size),
        ("hidden size", width, verifier.hidden_size),
    ):
        if has != needs:
            raise ValueError(
                f"{folder} is made for a verifier of {name} {has}, verifier.path has {needs}: set the head's verifier"
            )
    nested = {} if files.speculators else values.get(EAGLE) or {}
    read: dict[str, Any] = {
        field.ours: (layer if field.home == LAYER else values).get(field.name)
        or (field.nested and nested.get(field.name))
        or (field.absent and field.absent(layer, verifier))
        for field in fields.values()
        if field.ours
    }
    if layer.get("model_type") == "llama4_text":  # SGLang and TensorRT-LLM then read the other field
        read["intermediate_size"] = layer.get("intermediate_size_mlp") or layer["intermediate_size"]
    read |= {
        "draft_vocab_size": read["draft_vocab_size"] or lm_head_rows,
        "verifier_hidden_size": width,
        "aux_layers": _aux_layers(files),
        "rope_parameters": rope_parameters(folder, layer),
        **window_of(layer),
        "qk_norm": has_qk_norm(files.tensors),
        "fc_norm": bool(values.get("fc_norm") or values.get("use_aux_norm")),
        "norm_output": _norm_output(folder, values),
        "norm_before_residual": bool(values.get("norm_before_residual", files.speculators)),
    }
    if read["rope_parameters"].get("rope_type", "default") in _OF_ANY_LENGTH:
        # vLLM drafts nothing beyond this number, which then changes no rotation.
        read["max_position_embeddings"] = max(read["max_position_embeddings"], verifier.max_position_embeddings)
    return architecture.config(**read)


def _check_fields(files: HeadFiles, fields: dict[str, Field]) -> None:
    """Refuse what is unknown, and what the head's arithmetic is not."""
    folder, values, layer = files.folder, files.values, files.layer
    for name, place in itertools.product((EAGLE, LAYER, "rope_parameters", "rope_scaling"), (values, layer)):
        if not isinstance(place.get(name) or {}, dict):
            cure = "fields with values are required: fetch the head again"
            raise ValueError(f"{folder}: {name} is {place[name]!r}, {cure}")
    places = {TOP: values, LAYER: layer if layer is not values else {}, EAGLE: values.get(EAGLE) or {}}
    found = [
        (f"{place}.{name}".removeprefix("."), fields.get(name, Field(name)), value)
        for place, content in places.items()
        for name, value in content.items()
        if value is not None
    ]
    for path, field, value in found:
        if not field.allows(value):
            raise ValueError(f"{folder}: {path} is {value!r}, fledge's head knows {field.only!r} only: {_CURE}")
    for path, field, value in found:
        if field.home is not None:
            home = places[TOP if layer is values and field.home == LAYER else field.home]
            absent = field.name == "norm_before_residual" and files.speculators  # means true there
            if field.nested and path.startswith(EAGLE) and not files.speculators and home.get(field.name) is None:
                continue
            if value != home.get(field.name, absent):
                where = "at the top level" if home is values else f"in {field.home}"
                raise ValueError(
                    f"{folder}: {path} is {value!r}, and {field.name} is read {where}, where it is "
                    f"{home.get(field.name, 'absent')!r}: write the one that the head was trained with there, and "
                    "remove the other"
                )
    known = fields.keys() | {field.name for _, field, _ in found if has_no_effect(field.name)}
    unknown = [f"{path} = {value!r}" for path, field, value in found if field.name not in known]
    if unknown:
        raise ValueError(
            f"{folder / CONFIG} has fields that fledge does not know: {', '.join(unknown)}; it drops none silently, as "
            "they may change what the head computes: remove those that do not from the file"
        )
    _check_attention(folder, layer)


def _check_attention(folder: Path, layer: dict[str, Any]) -> None:
    """Refuse a head that attends otherwise than to all positions, or those of a window, by rotary positions."""
    window, kinds, switch = (layer.get(name) for name in ("sliding_window", "layer_types", "use_sliding_window"))
    known, layers = kinds or [], layer.get("num_hidden_layers") or 1
    slides = SLIDING in known[:layers]
    kind = CONFIG_MAPPING[layer["model_type"]] if layer.get("model_type") in CONFIG_MAPPING else None
    narrow = window and kinds is None and switch is None and hasattr(kind, "sliding_window")
    full = "fledge's head has full attention, or layer_types and a sliding_window"
    for name, refused, why in (
        ("layer_types", any(entry not in (FULL, SLIDING) for entry in known), full),
        ("layer_types", slides and len(known) != layers, f"one for each of {layers} layers is required"),
        ("sliding_window", slides and not window, "layer_types names layers that have one"),
        ("use_sliding_window", slides and switch is False, "layer_types names layers that have one"),
        ("use_sliding_window", switch and kinds is None, "layer_types must say which layers have it"),
        ("sliding_window", narrow and not hasattr(kind, "use_sliding_window"), "layer_types must say which layers"),
        ("no_rope_layers", not all(layer.get("no_rope_layers") or []), "fledge's head rotates in every layer"),
    ):
        if refused:
            raise ValueError(f"{folder}: {name} is {layer.get(name)!r}, {why}: {_CURE}")


def _norm_output(folder: Path, values: dict[str, Any]) -> bool:
    """Read whether the normed state is fed onward, by either name."""
    top, nested = values.get("norm_output"), (values.get(EAGLE) or {}).get(POST_NORM)
    if top is not None and nested is not None and top != nested:
        raise ValueError(
            f"{folder}: norm_output is {top} and {EAGLE}.{POST_NORM} {nested}, TensorRT-LLM's name of the same: "
            "correct config.json to the one the head was trained with"
        )
    return bool(top or nested)


def rope_parameters(folder: Path, layer: dict[str, Any]) -> dict[str, Any]:
    """Join the rotary fields, in the form of transformers 5 (`rope_parameters`) or the older one (two fields)."""
    joined = {name: layer[name] for name in ("rope_theta", PARTIAL) if layer.get(name)}
    found = [(name, *item) for name in ("rope_parameters", "rope_scaling") for item in (layer.get(name) or {}).items()]
    for name, field, value in found:
        if not ROPE_FIELDS.fullmatch(field):
            cure = "which fledge's head does not know: remove it if the head was trained without"
            raise ValueError(f"{folder}: {name}.{field} is {value!r}, {cure}")
        if field in ("rope_type", "type"):
            field, value = "rope_type", _ROPE_ALIASES.get(str(value), value)
        if value is not None and joined.setdefault(field, value) != value:
            raise ValueError(
                f"{folder}: {field} is {joined[field]}, and {value} in {name}: correct config.json to the one the head "
                "was trained with"
            )
    joined = {"rope_type": "default", "rope_theta": 10000.0, **joined}
    if (factor := joined.get(PARTIAL, 1)) == 1:
        joined.pop(PARTIAL, None)
    elif not 0 < factor < 1:
        raise ValueError(f"{folder}: {PARTIAL} is {factor}, a share between 0 and 1 is required: {_CURE}")
    if joined["rope_type"] not in ["default", *ROPE_INIT_FUNCTIONS]:
        raise ValueError(f"{folder}: rope_type is {joined['rope_type']!r}, fledge's head does not know it: {_CURE}")
    return joined


def _aux_layers(files: HeadFiles) -> tuple[int, ...]:
    """Return the aux layers, 0-based and ascending, the order in which every engine concatenates their states.

    Nested ids are 0-based, those of the Speculators format are vLLM's, one higher. At the top level of a plain head
    both occur in the wild: nested ids next to them tell which, without them the option must.
    """
    folder, options, num_layers = files.folder, files.options, files.verifier.num_hidden_layers
    nested, top, numbering = files.ids(EAGLE), files.ids(TOP), options.aux_numbering
    found = [(place or {}).get(AUX_IDS) or [] for place in (files.values.get(EAGLE), files.values)]
    if not all(isinstance(ids, list) and all(isinstance(k, int) for k in ids) for ids in found):
        raise ValueError(f"{folder}: {AUX_IDS} must be a list of integers, got {found[0] or found[1]}")
    numbering_is_open = top and not nested and not files.speculators
    for name, value, is_open in (
        ("aux_numbering", numbering and numbering.value, numbering_is_open),
        ("aux_layers", options.aux_layers, not top and not nested),
    ):
        if value is not None and not is_open:
            cure = "leaves nothing open: drop the option"
            raise ValueError(f"head_import.{name} is {value}, and {folder / CONFIG} {cure}")
    if nested and top and top != nested and (files.counts_boundaries or top != vllm_layer_ids(nested)):
        raise ValueError(
            f"{folder}: {AUX_IDS} is {top} at the top level and {nested} in eagle_config, which are not the same "
            "layers in any numbering: correct config.json to those the head was trained with"
        )
    if not files.names_layers:
        default = files.default_layers()
        usual = f"; engines take {default} unasked, which costs acceptance if it was others" if default else ""
        raise ValueError(
            f"{folder / CONFIG} does not say which layers the head was trained on: set "
            f"head_import.aux_layers=[...] to them (0-based, of the verifier's {num_layers}){usual}"
        )
    if numbering_is_open and numbering is None:
        raise ValueError(
            f"{folder}: {AUX_IDS} is {top} at the top level alone, which projects number in two ways: set "
            "head_import.aux_numbering=zero_based if id k is the output of layer k, =vllm if of layer k-1"
        )
    layers = nested if files.speculators and nested else files.aux_layers()
    if len(set(layers)) != len(layers) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise ValueError(
            f"{folder}: the aux layers are {layers} (0-based), different ones from 0 to {num_layers - 1}, the "
            "verifier's, are required"
        )
    for place in (files.values, files.layer):
        if (number := place.get("num_aux_hidden_states")) not in (None, len(layers)):
            raise ValueError(
                f"{folder}: num_aux_hidden_states is {number}, and the aux layers are {layers} (0-based): correct "
                "config.json to what the head was trained with"
            )
    return tuple(layers)
