"""The doctor names what is wrong with a head, and nothing where nothing is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import make_head, matrices
from fledge.conf.schema import Config, validate
from fledge.eval.doctor import diagnose, report
from fledge.eval.doctor_rules import IDS, Published, engine_notes, static_findings
from fledge.models.foreign_head import read_published
from fledge.models.formats import load_head, save_head
from fledge.models.speculators_format import save_speculators
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

SHAPE = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=120,
    num_hidden_layers=8, max_position_embeddings=256,
)  # fmt: skip
EMBEDDING, _ = matrices()
ABSENT = object()
VERIFIER = {"name_or_path": "some/verifier", "architectures": ["LlamaForCausalLM"]}


def head_in(folder: Path, speculators: bool = False, **changes: Any) -> Path:
    if speculators:
        save_speculators(folder, make_head(**changes), {}, torch.bfloat16, VERIFIER, 3)
    else:
        save_head(folder, make_head(**changes), {}, torch.bfloat16)
    return folder


def change_config(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in values.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder: Path, changes: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({n: t for n, t in tensors.items() if t is not ABSENT}, folder / "model.safetensors")


def as_published(folder: Path) -> Published:
    return Published(folder, *read_published(folder), SHAPE, EMBEDDING)


def codes(folder: Path) -> list[str]:
    findings = static_findings(as_published(folder))
    assert engine_notes(as_published(folder))
    assert all(finding.what and finding.cost and finding.cure for finding in findings)
    return [finding.code for finding in findings]


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
        ({"num_hidden_layers": 2}, "layers"),
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
        ({"midlayer.self_attn.q_norm.weight": torch.ones(16)}, "unknown_tensors"),
        ({"norm.weight": torch.full((32,), float("nan"))}, "not_finite"),
        ({"embed_tokens.weight": EMBEDDING + 1}, "embedding"),
        ({"embed_tokens.weight": EMBEDDING[:100].clone()}, "embedding"),
        ({"embed_tokens.weight": EMBEDDING.bfloat16()}, None),
    ],
)
def test_each_damage_of_the_tensors_gives_its_own_finding(tmp_path, changes, code):
    change_tensors(head_in(tmp_path), changes)
    assert codes(tmp_path) == ([code] if code else [])


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


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"model_type": "x"}, 1), (None, 2)])
def test_the_exit_code_tells(config, tmp_path, changes, code):
    change_config(tmp_path, **(changes or {}))
    source = tmp_path if changes is not None else tmp_path / "nowhere"
    command = [
        *(sys.executable, "-m", "fledge", "doctor", f"head_import.source={source}", "name=x"),
        *(f"verifier.path={config.verifier.path}", "verifier.dtype=float32", "verifier.device=cpu"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
