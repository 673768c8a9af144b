"""The doctor names what is wrong with a head, and nothing where nothing is."""

from __future__ import annotations

import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from builders import make_head
from commands import run_command
from fledge.conf.schema import Config, VerifierConfig, validate
from fledge.eval.doctor.doctor import diagnose, report
from fledge.eval.doctor.rules import engine_notes, static_findings
from fledge.models.formats.fields import AUX_IDS as IDS
from fledge.models.formats.plain import load_head, save_head
from published_heads import ABSENT, EMBEDDING, SHAPE, as_published, change_config, change_tensors, codes, head_in
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("changes", [{}, {"draft_vocab_size": None}, {"aux_layers": (0, 2, 5), "fc_norm": False}])
def test_nothing_is_found_in_a_good_head(tmp_path, speculators, changes):
    assert codes(head_in(tmp_path, speculators, **changes)) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"eagle_config": {}, IDS: ABSENT}, "aux_absent"),
        ({IDS: ABSENT}, "aux_one_numbering"),
        ({"eagle_config": {}}, "aux_one_numbering"),
        ({IDS: [1, 3, 4]}, "aux_contradictory"),
        ({IDS: [2, 4, 6]}, "aux_contradictory"),
        ({IDS: "2,4,5"}, "aux_malformed"),
        ({"eagle_config": {IDS: [1, 3, 8]}, IDS: [2, 4, 9]}, "aux_out_of_range"),
        ({"eagle_config": {IDS: [1, 3, 3]}, IDS: [2, 4, 4]}, "aux_out_of_range"),
        ({"eagle_config": {IDS: [2, 4, 5]}, IDS: [3, 5, 6]}, "aux_one_off"),
        ({"eagle_config": {IDS: [0, 2, 3]}, IDS: [1, 3, 4]}, "aux_one_off"),
        ({"eagle_config": {IDS: [1, 3, 7]}, IDS: [2, 4, 8]}, "aux_last_layer"),
        ({"eagle_config": {IDS: [1, 4]}, IDS: [2, 5]}, "aux_count"),
        ({"rope_theta": 5e5, "rope_parameters": ABSENT}, "rope"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, "rope"),
        ({"rope_theta": 5e5}, "rope_contradictory"),
        ({"max_position_embeddings": 128}, "max_position_embeddings"),
        ({"max_position_embeddings": ABSENT}, "max_position_embeddings"),
        ({"draft_vocab_size": ABSENT}, "draft_vocab_size"),
        ({"draft_vocab_size": None}, "draft_vocab_size"),
        ({"draft_vocab_size": 90}, "draft_vocab_size"),
        ({"model_type": "llama4_text"}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization"),
        ({"num_hidden_layers": 2}, "layer_count"),
        ({"num_hidden_layers": 42}, "layer_count"),
        (
            {"norm_output": ABSENT, "eagle_config": {IDS: [1, 3, 4], "return_hidden_post_norm": True}},
            "norm_output_nested",
        ),
        (
            {"norm_output": False, "eagle_config": {IDS: [1, 3, 4], "return_hidden_post_norm": True}},
            "norm_output_nested",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_contradictory"),
        ({"attention_bias": ABSENT}, "trtllm_fields"),
        ({"tie_word_embeddings": ABSENT, "mlp_bias": ABSENT}, "trtllm_fields"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"fc_norm": ABSENT}, "unknown_tensors"),
    ],
)
def test_each_damage_of_a_plain_config_gives_its_own_finding(tmp_path, changes, code):
    change_config(head_in(tmp_path), **changes)
    assert codes(tmp_path) == [code]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"norm_before_residual": ABSENT}, "norm_before_residual_absent"),
        ({IDS: ABSENT}, "aux_absent"),
        ({IDS: [1, 3, 4]}, "aux_one_off"),
        ({IDS: [0, 3, 4]}, "aux_out_of_range"),
        ({IDS: [2, 4]}, "aux_count"),
        ({IDS: [2, 4, 5, 7]}, "aux_count"),
        ({IDS: [2, 3, 4, 5, 6]}, "aux_count"),
    ],
)
def test_each_damage_of_a_speculators_config_gives_its_own_finding(tmp_path, changes, code):
    change_config(head_in(tmp_path, speculators=True), **changes)
    assert codes(tmp_path) == [code]


IDS_OF_DRAFT = make_head().target_ids


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"lm_head.weight": ABSENT}, "lm_head_absent"),
        ({"d2t": ABSENT, "t2d": ABSENT}, "d2t_absent"),
        ({"d2t": ABSENT}, "d2t_absent"),
        ({"d2t": IDS_OF_DRAFT, "t2d": ABSENT}, "d2t_absolute"),
        ({"d2t": IDS_OF_DRAFT}, "d2t_absolute"),
        ({"d2t": torch.full((100,), 21)}, "d2t_out_of_range"),
        ({"d2t": torch.zeros(100, dtype=torch.int64)}, "maps_contradictory"),
        ({"norm.weight": ABSENT, "model.norm.weight": torch.ones(32)}, "prefixed"),
        ({"midlayer.self_attn.q_norm.weight": torch.ones(16)}, "qk_norm"),
        ({"midlayer.self_attn.sinks": torch.ones(4)}, "unknown_tensors"),
        ({"norm.weight": torch.full((32,), float("nan"))}, "not_finite"),
        ({"embed_tokens.weight": EMBEDDING + 1}, "embedding"),
        ({"embed_tokens.weight": EMBEDDING[:100].clone()}, "embedding"),
        ({"embed_tokens.weight": EMBEDDING.bfloat16()}, None),
    ],
)
def test_each_damage_of_the_tensors_gives_its_own_finding(tmp_path, changes, code):
    change_tensors(head_in(tmp_path), changes)
    assert codes(tmp_path) == ([code] if code else [])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize(
    "name", ["midlayer.mlp.up_proj.weight", "embed_tokens.weight", "lm_head.weight", "norm.weight"]
)
def test_tensors_of_a_dtype_that_cannot_be_tested_are_named(tmp_path, dtype, name):
    tensors = {"embed_tokens.weight": EMBEDDING, **load_file(head_in(tmp_path) / "model.safetensors")}
    change_tensors(tmp_path, {name: tensors[name].to(dtype)})
    findings = static_findings(as_published(tmp_path))
    assert [finding.code for finding in findings] == ["dtype"]
    assert f"{name} is {str(dtype).removeprefix('torch.')}" in findings[0].what


@pytest.mark.parametrize("prefix", ["draft_model.", "module.", "eagle_module._orig_mod."])
@pytest.mark.parametrize("speculators", [False, True])
def test_a_prefix_before_every_tensor_is_the_one_finding(tmp_path, prefix, speculators):
    tensors = load_file(head_in(tmp_path, speculators) / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    findings = static_findings(as_published(tmp_path))
    assert [(finding.code, finding.cure) for finding in findings] == [("prefixed", f"remove '{prefix}' from the names")]


@pytest.mark.parametrize("scaling", [{"type": "mrope"}, {"rope_type": "mrope"}, {"mrope_interleaved": True}])
def test_sections_by_image_axis_are_no_other_rope_on_text(tmp_path, scaling):
    scaling = {**scaling, "mrope_section": [2, 3, 3]}
    change_config(head_in(tmp_path), rope_scaling=scaling, rope_parameters=ABSENT)
    assert codes(tmp_path) == []


def test_both_cures_of_a_missing_lm_head_are_named_for_a_full_vocabulary(tmp_path):
    change_tensors(head_in(tmp_path, draft_vocab_size=None), {"lm_head.weight": ABSENT})
    (finding,) = static_findings(as_published(tmp_path))
    assert "fetch the head's complete checkpoint" in finding.cure
    assert "draft_vocab_size: null" in finding.cure
    change_config(tmp_path, reuse_target_lm_head=True)
    assert codes(tmp_path) == ["lm_head_shared"]
    change_config(tmp_path, draft_vocab_size=None)
    assert codes(tmp_path) == []


def test_a_map_beside_a_full_vocabulary_is_found(tmp_path):
    change_tensors(head_in(tmp_path, draft_vocab_size=None), {"d2t": torch.zeros(120, dtype=torch.int64)})
    assert codes(tmp_path) == ["d2t_full"]


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": {"rope_type": "default"}},
    ],
)
def test_a_head_with_the_rope_that_fledge_derives_is_sound(tmp_path, rope):
    published = as_published(head_in(tmp_path))
    published.verifier = SimpleNamespace(**{**SHAPE.to_dict(), "rope_parameters": rope})
    assert static_findings(published) == []


def test_all_problems_are_named_at_once(tmp_path):
    change_config(head_in(tmp_path), model_type="x", max_position_embeddings=1, **{IDS: [1, 3, 4]})
    change_tensors(tmp_path, {"lm_head.weight": ABSENT})
    assert codes(tmp_path) == ["aux_contradictory", "model_type", "max_position_embeddings", "lm_head_absent"]


def test_engines_are_said_to_take_the_layers_they_take(tmp_path):
    change_config(head_in(tmp_path, aux_layers=(2, 3, 6)), **{IDS: [2, 3, 6]})
    notes = "\n".join(engine_notes(as_published(tmp_path)))
    assert "vLLM: takes layers [1, 2, 5] (0-based), NOT [2, 3, 6]" in notes
    assert "SGLang: takes layers [2, 3, 6] (0-based), the right ones" in notes
    assert "eagle3_layers_to_capture: [2, 3, 6]" in notes


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("ids", [ABSENT, None, []])
def test_layers_that_config_json_does_not_name_are_called_right_nowhere(tmp_path, speculators, ids):
    change_config(head_in(tmp_path, speculators, aux_layers=(0, 2, 6)), **{"eagle_config": {}, IDS: ids})
    published = as_published(tmp_path)
    assert codes(tmp_path) == ["aux_absent"]
    assert not published.names_layers
    notes = "\n".join(engine_notes(published))
    assert (
        "vLLM: takes layers [1, 3, 4] (0-based), its default: config.json does not say whether they are right" in notes
    )
    assert "the right ones" not in notes
    published.options.aux_layers = [6, 0, 2]
    assert published.aux_layers() == [0, 2, 6]
    assert "vLLM: takes layers [1, 3, 4] (0-based), NOT [0, 2, 6]" in "\n".join(engine_notes(published))


@pytest.fixture
def config(tmp_path, finished, verifier_config) -> Config:
    """The trained head of a finished run, in a folder of its own, to be damaged."""
    head, _ = load_head(finished.path / "training" / "checkpoints" / "step-24")
    save_head(tmp_path, head, {}, torch.float32)
    config = Config(name="run", verifier=verifier_config)
    config.head_import.source = str(tmp_path)
    return config


def test_nothing_is_found_in_a_head_that_fledge_trained(config):
    diagnosis = diagnose(config)
    assert diagnosis.findings == []
    assert "Found: nothing" in report(diagnosis)
    assert "as configured" in report(diagnosis)
    config.doctor.measure = False
    assert "Not measured" in report(diagnose(config))


def test_a_verifier_that_was_tuned_since_is_named_and_the_head_measured_with_it(config, finished, tmp_path):
    record, tuned = finished.path / "exports" / "plain" / "fledge.json", tmp_path / "tuned"
    shutil.copy(record, tmp_path)
    sound = diagnose(config)
    assert sound.findings == []
    assert re.search(r"trained on has \d+ tokens.* export.sliding_window=256", report(sound))
    shutil.copytree(config.verifier.path, tuned)
    weights = load_file(tuned / "model.safetensors")
    save_file({name: 1.01 * tensor for name, tensor in weights.items()}, tuned / "model.safetensors", {"format": "pt"})
    config.verifier = VerifierConfig(str(tuned), dtype=config.verifier.dtype, device=config.verifier.device)
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["other_verifier"]
    assert "fingerprint" in diagnosis.findings[0].what
    assert "as configured" in report(diagnosis)


def test_too_little_text_is_said(config):
    config.doctor.max_tokens = 3
    diagnosis = diagnose(config)
    assert diagnosis.verdict is None
    assert "Not measured: 0 answers of the verifier are long enough" in report(diagnosis)
    with pytest.raises(ValueError, match=r"doctor\.max_tokens must be at least 4"):
        validate(config)


def test_a_head_that_cannot_be_put_together_is_a_finding(config, tmp_path):
    change_tensors(tmp_path, {"fc.weight": torch.ones(3, 3)})
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["unreadable"]
    assert "Not measured" in report(diagnosis)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8])
def test_a_quantised_head_is_diagnosed_without_measurement(config, tmp_path, dtype):
    weight = load_file(tmp_path / "model.safetensors")["midlayer.mlp.up_proj.weight"]
    change_tensors(tmp_path, {"midlayer.mlp.up_proj.weight": weight.to(dtype)})
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["dtype"]
    assert "Not measured" in report(diagnosis)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["chunked_attention"], "sliding_window": 16}, "layer_types is"),
        ({"attention_chunk_size": 64}, "attention_chunk_size is 64"),
        ({"gated_residual": True}, "fields that fledge does not know: gated_residual = True"),
    ],
)
def test_a_field_that_import_refuses_is_a_finding(config, tmp_path, changes, words):
    change_config(tmp_path, **changes)
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["unreadable"]
    assert words in diagnosis.findings[0].what


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"model_type": "x"}, 1), (None, 2)])
def test_the_exit_code_tells(config, tmp_path, changes, code):
    change_config(tmp_path, **(changes or {}))
    source = tmp_path if changes is not None else tmp_path / "nowhere"
    command = [
        *(sys.executable, "-m", "fledge", "doctor", f"head_import.source={source}", "name=x"),
        *(f"verifier.path={config.verifier.path}", "verifier.dtype=float32", "verifier.device=cpu"),
    ]
    done = run_command(command, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
