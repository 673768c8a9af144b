"""What the doctor says of a head's form: the places of its fields, its tensors, and the engines that serve it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from fledge.eval.doctor.doctor import readable_head
from fledge.eval.doctor.rules import engine_notes
from fledge.models.formats.fields import AUX_IDS as IDS
from published_heads import ABSENT, SHAPE, as_published, change_config, change_tensors, codes, head_in
from safetensors.torch import load_file

FORMS = [
    {"norm_before_fc": True, "fc_norm": False},
    {"attention_bias": True},
    {"qk_norm": True},
    {"num_layers": 3},
    {"sliding_window": 32, "window_layers": (0,)},
    {"qk_norm": True, "sliding_window": 32, "window_layers": (1,), "num_layers": 2},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    {"aux_layers": (0, 1, 3, 4)},
]


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("changes", FORMS)
def test_nothing_is_found_in_an_export_of_any_form(tmp_path, speculators, changes):
    assert codes(head_in(tmp_path, speculators, **changes)) == []


WINDOW = {"layer_types": ["sliding_attention"], "sliding_window": 32}


@pytest.mark.parametrize(
    ("form", "changes", "code"),
    [
        ({"norm_before_fc": True}, {"eagle_config": {IDS: [1, 3, 4]}}, "norm_before_fc_place"),
        ({"norm_before_fc": True}, {"eagle_config": {IDS: [1, 3, 4], "norm_before_fc": False}}, "norm_before_fc_place"),
        ({"norm_before_fc": True}, {"norm_before_fc": ABSENT}, None),  # as NVIDIA writes it
        ({"attention_bias": True}, {"attention_bias": False}, "attention_bias"),
        ({"qk_norm": True}, {"architectures": ["LlamaForCausalLMEagle3"]}, "qk_norm"),
        ({}, {"architectures": ["Eagle3Qwen3ForCausalLM"]}, "qk_norm"),
        ({}, {"sliding_window": 32}, "window"),
        ({}, {"sliding_window": 32, "use_sliding_window": False}, None),
        ({}, {"sliding_window": 32, "layer_types": ["full_attention"]}, None),
        ({"qk_norm": True}, WINDOW, "window"),
        ({}, WINDOW, None),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"partial_rotary_factor": ABSENT},
            "partial_rotary_factor",
        ),
        ({"num_layers": 2}, {"num_hidden_layers": 3}, "layer_count"),
    ],
)
def test_a_field_where_an_engine_does_not_read_it_is_found(tmp_path, form, changes, code):
    change_config(head_in(tmp_path, **form), **changes)
    assert codes(tmp_path) == ([code] if code else [])


def test_a_norm_that_config_json_does_not_declare_is_found_and_measured_with(tmp_path):
    change_config(head_in(tmp_path, norm_before_fc=True), norm_before_fc=False, eagle_config={IDS: [1, 3, 4]})
    assert codes(tmp_path) == ["norm_before_fc"]
    assert readable_head(as_published(tmp_path)).config.norm_before_fc


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"layers.1.hidden_norm.weight": torch.ones(32)}, "later_norms"),
        ({"layers.1.hidden_norm.weight": ABSENT}, "later_norms"),
        ({"layers.1.input_layernorm.weight": ABSENT}, "later_norms"),
    ],
)
def test_a_norm_of_a_later_layer_that_an_engine_does_not_find_is_named(tmp_path, changes, code):
    change_tensors(head_in(tmp_path, num_layers=2), changes)
    assert codes(tmp_path) == [code]


def test_a_first_layer_that_tensorrt_llm_does_not_find_is_named(tmp_path):
    tensors = load_file(head_in(tmp_path, num_layers=2) / "model.safetensors")
    first = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.0.")}
    renamed = {name.replace("layers.0.", "midlayer."): tensor for name, tensor in first.items()}
    change_tensors(tmp_path, {**dict.fromkeys(first, ABSENT), **renamed})
    assert codes(tmp_path) == ["layer_names"]


@pytest.mark.parametrize("present", [True, False])
def test_vllm_counts_aux_layers_in_speculators_format_by_a_field_of_the_layer(tmp_path, present):
    head_in(tmp_path, True, aux_layers=(0, 1, 3, 4))
    layer = as_published(tmp_path).values["transformer_layer_config"]
    assert layer["num_aux_hidden_states"] == 4
    if not present:
        del layer["num_aux_hidden_states"]
    change_config(tmp_path, transformer_layer_config=layer)
    assert codes(tmp_path) == ([] if present else ["aux_count"])


def notes_of(folder: Path, **verifier: Any) -> str:
    files = as_published(folder)
    if verifier:
        files.verifier = type(SHAPE)(**{**SHAPE.to_dict(), **verifier})
        files.verifier.model_type = verifier.get("model_type", "llama")
    return "\n".join(engine_notes(files))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({"norm_before_residual": True}, "SGLang: cannot serve .*: it ignores norm_before_residual"),
        ({"sliding_window": 32, "window_layers": (0,)}, "SGLang: needs --speculative-draft-window-size 31"),
        ({"num_layers": 2, "sliding_window": 32, "window_layers": (0,)}, "vLLM: needs --disable-hybrid-kv-cache"),
        ({"norm_before_fc": True}, "TensorRT-LLM: cannot serve .*: it applies fc_norm alone"),
        ({"qk_norm": True}, "SGLang: cannot serve .*norms of q and k"),
        ({"fc_norm": True}, "llama.cpp: cannot serve .*: it knows no fc_norm"),
    ],
)
def test_engines_that_do_not_serve_a_form_are_named_with_the_reason(tmp_path, form, words):
    assert re.search(words, notes_of(head_in(tmp_path, **form)))


def test_nested_ids_of_gpt_oss_count_boundaries(tmp_path):
    head_in(tmp_path, aux_layers=(1, 5, 7))
    change_config(tmp_path, eagle_config={IDS: [2, 6, 8]}, **{IDS: ABSENT})
    notes = notes_of(tmp_path, model_type="gpt_oss")
    for engine in ("vLLM", "SGLang"):
        assert f"{engine}: takes layers [1, 5, 7] (0-based), the right ones" in notes
