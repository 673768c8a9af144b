"""The doctor names what is wrong with a head, and nothing where nothing is."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Run, make_head, matrices
from fledge.conf.schema import Config
from fledge.data_synthesis.conversations import read_conversations
from fledge.data_synthesis.prompts import is_heldout
from fledge.eval.doctor import diagnose, report
from fledge.eval.doctor_measure import STEPS, Text, readable_head, teacher_forced_hits
from fledge.eval.doctor_rules import IDS, Published, engine_notes, static_findings
from fledge.eval.draft_decoder import DraftDecoder
from fledge.models.foreign_head import read_published
from fledge.models.formats import load_head, save_head
from fledge.models.speculators_format import save_speculators
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

SHAPE = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=120,
    num_hidden_layers=8, max_position_embeddings=256,
)  # fmt: skip
EMBEDDING, LM_HEAD = matrices()
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


# the files


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


def test_all_problems_are_named_at_once(tmp_path):
    change_config(head_in(tmp_path), model_type="x", max_position_embeddings=1, **{IDS: [1, 3, 4]})
    change_tensors(tmp_path, {"lm_head.weight": ABSENT})
    assert codes(tmp_path) == ["aux_contradictory", "model_type", "max_position_embeddings", "lm_head_absent"]


def test_engines_are_said_to_take_the_layers_they_take(tmp_path):
    change_config(head_in(tmp_path, aux_layers=(2, 3, 6)), **{IDS: [2, 3, 6]})
    notes = "\n".join(engine_notes(as_published(tmp_path)))
    assert "vLLM: takes layers [1, 2, 5] (0-based), NOT [2, 3, 6]" in notes
    assert "SGLang: takes layers [2, 3, 6] (0-based), the layers meant" in notes
    assert "eagle3_layers_to_capture: [2, 3, 6]" in notes


@pytest.mark.parametrize(
    "changes",
    [
        {"d2t": IDS_OF_DRAFT, "t2d": ABSENT},
        {"d2t": ABSENT},
        {"norm.weight": ABSENT, "model.norm.weight": make_head().norm.weight.detach().bfloat16()},
        {"rotary.inv_freq": torch.ones(8)},
        {"embed_tokens.weight": EMBEDDING + 1},
        {},
    ],
)
def test_what_leaves_no_choice_is_corrected_before_measuring(tmp_path, changes):
    change_tensors(head_in(tmp_path), changes)
    change_config(tmp_path, quantization_config={"quant_method": "fp8"}, rope_theta=3.0, draft_vocab_size=ABSENT)
    read, expected = readable_head(as_published(tmp_path), LM_HEAD), make_head()
    assert read.config == expected.config
    assert torch.equal(read.target_ids, expected.target_ids)
    assert torch.equal(read.norm.weight, expected.norm.weight.bfloat16().float())


# the measurement


def test_teacher_forced_hits_are_those_of_cached_decoding():
    head, start = make_head(), 6
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 120, (20,), generator=generator).tolist()
    aux = {layer: torch.randn(20, 32, generator=generator) for layer in (1, 3, 4)}
    states = torch.cat([aux[layer] for layer in (1, 3, 4)], dim=-1)
    decoder = DraftDecoder(head, EMBEDDING)
    chosen = torch.full((20 - 1 - start, STEPS), -1)
    for row in range(start - 1, 18):
        decoder.start([])
        decoder.extend(tokens[1 : row + 2], states[: row + 1])
        for step in range(min(STEPS, 18 - row)):
            if step:
                decoder.feed(tokens[row + 1 + step], step)
            chosen[row - start + 1, step] = head.target_ids[decoder.logits().argmax()]
    # each row's own greedy token is made the text's in turn: only there is a hit
    for row, step in ((start - 1, 0), (start + 2, 1), (start + 4, 2)):
        text = list(tokens)
        text[row + 2 + step] = int(chosen[row - start + 1, step])
        assert teacher_forced_hits(head, Text(text, start, aux), EMBEDDING)[row - start + 1, step]
    expected = torch.zeros(13, STEPS, dtype=torch.bool)
    for row in range(start - 1, 18):
        for step in range(min(STEPS, 18 - row)):
            expected[row - start + 1, step] = chosen[row - start + 1, step] == tokens[row + 2 + step]
    assert torch.equal(teacher_forced_hits(head, Text(tokens, start, aux), EMBEDDING), expected)


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory) -> Run:
    """A head of the first form, trained until other forms of it are worse on the texts that it knows."""
    run = Run(tmp_path_factory.mktemp("trained"), finished.verifier)
    for stage in ("conversations", "hidden_states"):
        shutil.copytree(finished.path / stage, run.path / stage)
    run("train", "draft=eagle3", "train.max_steps=160", "train.save_every=160", "train.heldout_every=160")
    return run


@pytest.fixture(scope="module")
def known_questions(trained, tmp_path_factory) -> Path:
    """The opening turns that the head was trained on."""
    path = tmp_path_factory.mktemp("questions") / "own.jsonl"
    with path.open("w") as lines:
        for record in read_conversations(trained.path / "conversations"):
            said = record["messages"][0]
            if (
                said["role"] == "user"
                and "length" not in record["finish_reasons"]
                and not is_heldout(record["id"], 0.25)
            ):
                lines.write(json.dumps({"question_id": record["id"], "turns": [said["content"]]}) + "\n")
    return path


@pytest.fixture
def exported(tmp_path, trained) -> Path:
    """The head in a folder of its own, to be damaged."""
    folder = tmp_path / "head"
    folder.mkdir()
    head, _ = load_head(trained.path / "training" / "checkpoints" / "step-160")
    save_head(folder, head, {}, torch.float32)
    return folder


@pytest.fixture
def config(exported, verifier_config, known_questions) -> Config:
    config = Config(name="run", verifier=verifier_config)
    config.head_import.source = str(exported)
    config.evaluate.questions, config.doctor.num_prompts = str(known_questions), 64
    return config


def test_an_undamaged_trained_head_is_healthy(config):
    diagnosis = diagnose(config)
    assert diagnosis.findings == []
    assert diagnosis.healthy, report(diagnosis)
    assert "The weights were trained for: as configured" in report(diagnosis)


BOTH_IDS = f"eagle_config.{IDS}: [1, 3, 4] and {IDS} at the top level: [2, 4, 5]"


@pytest.mark.parametrize(
    ("changes", "cure", "found"),
    [
        ({"eagle_config": {IDS: [0, 2, 3]}, IDS: [1, 3, 4]}, BOTH_IDS, ["aux_one_off"]),
        ({"norm_before_residual": True}, "norm_before_residual: false", []),
        ({"norm_output": True}, "norm_output: false", []),
    ],
    ids=["aux", "norm_before_residual", "norm_output"],
)
def test_the_form_a_head_was_trained_for_is_measured(exported, config, changes, cure, found):
    change_config(exported, **changes)
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == found
    assert diagnosis.trained_for is not None
    assert diagnosis.trained_for.cure == cure, report(diagnosis)
    assert not diagnosis.healthy
    assert f"Cure: write {cure}" in report(diagnosis)


def test_norm_before_residual_absent_in_speculators_format_is_found_and_measured(exported, config, trained):
    head, _ = load_head(trained.path / "training" / "checkpoints" / "step-160")
    save_speculators(exported, head, {}, torch.float32, VERIFIER, 3)
    change_config(exported, norm_before_residual=ABSENT)
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["norm_before_residual_absent"]
    assert diagnosis.trained_for.cure == "norm_before_residual: false", report(diagnosis)


def test_a_head_that_cannot_be_put_together_is_a_finding(exported, config):
    change_tensors(exported, {"fc.weight": torch.ones(3, 3)})
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["unreadable"]
    assert "Not measured" in report(diagnosis)


@pytest.mark.parametrize(("changes", "code"), [({}, 0), ({"model_type": "x"}, 1), (None, 2)])
def test_the_exit_code_tells(exported, config, changes, code):
    change_config(exported, **(changes or {}))
    source = exported if changes is not None else exported / "nowhere"
    command = [
        *(sys.executable, "-m", "fledge", "doctor", f"head_import.source={source}", "name=x"),
        *(f"verifier.path={config.verifier.path}", "verifier.dtype=float32", "verifier.device=cpu"),
        *(f"evaluate.questions={config.evaluate.questions}", "doctor.num_prompts=64"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=exported)
    assert done.returncode == code, done.stdout + done.stderr
