"""What a head's weights were trained for, measured on a head that was trained well enough to tell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import Run, copy_parts, make_head, matrices
from fledge.conf.schema import Config, HeadImportConfig
from fledge.data_synthesis.conversations import read_conversations
from fledge.eval.doctor import measure
from fledge.eval.doctor.doctor import Diagnosis, diagnose, readable_head, report
from fledge.eval.doctor.measure import (
    STEPS,
    Measured,
    Text,
    Variant,
    Verdict,
    _in_form,
    answers,
    compare,
    teacher_forced,
    variants,
)
from fledge.models.formats.fields import AUX_IDS as IDS
from fledge.models.formats.plain import load_head, save_head
from fledge.models.formats.published import read_files, read_published_head
from fledge.models.formats.speculators import save_speculators
from fledge.models.head.draft_head import DraftHead
from fledge.models.verifier.config import load_config
from fledge.models.verifier.weights import VerifierWeights
from one_sequence import OneSequence
from safetensors.torch import load_file, save_file
from small_heads import FORMS

EMBEDDING, _ = matrices()


@pytest.mark.parametrize(
    "form", [None, "speculators", "partial_rotation", "qk_norm", "window", "five_layers_full_vocabulary"]
)
def test_teacher_forced_steps_are_those_of_cached_decoding(form):
    trained, start = make_head(**FORMS.get(form, {})), 6
    head = _in_form(trained, trained.config)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 120, (20,), generator=generator).tolist()
    aux = {layer: torch.randn(20, 32, generator=generator) for layer in (1, 3, 4)}
    log_p = torch.randn(20 - start, head.config.draft_vocab_size, generator=generator).log_softmax(-1)
    hits, nats = teacher_forced(head, Text(tokens, start, aux, log_p), EMBEDDING)
    rows = range(start - 1, 20 - 1 - STEPS)
    assert len(hits) == len(nats) == len(rows)
    for row, found, total in zip(rows, hits, nats, strict=True):
        decoder = OneSequence(head, EMBEDDING)
        decoder.extend(tokens[1 : row + 2], torch.cat([aux[layer][: row + 1] for layer in (1, 3, 4)], dim=-1))
        expected = 0.0
        for step in range(STEPS):
            if step:
                decoder.feed(tokens[row + 1 + step], step)
            target = tokens[row + 2 + step]
            assert bool(found[step]) == (int(head.target_ids[decoder.logits().argmax()]) == target)
            p, log_q = log_p[row + 1 + step - start].exp(), decoder.logits().log_softmax(-1)
            expected += float((p * (p.log() - log_q)).sum())
        assert float(total) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("answered", "rows"), [(1, 0), (2, 0), (3, 0), (4, 1), (9, 6)])
def test_short_answers_have_no_rows(answered, rows):
    text = Text(list(range(6 + answered)), 6, {1: torch.zeros(6 + answered, 32)}, torch.zeros(answered, 100))
    head = make_head(aux_layers=(1,))
    hits, nats = teacher_forced(head, text, EMBEDDING)
    assert (len(hits), len(nats)) == (rows, rows)


# verdicts, on figures made up


def measured(name: str, changes: tuple[str, ...], nats: float, accepted: float) -> Measured:
    """A form with these means on 20 texts of 10 rows that differ from text to text."""
    generator = torch.Generator().manual_seed(len(name))
    rows = [torch.full((10,), nats) + 0.1 * torch.randn(1, generator=generator) for _ in range(20)]
    hits = [torch.zeros(10, STEPS, dtype=torch.bool) for _ in range(20)]
    for text in hits:
        text[: round(10 * accepted), 0] = True
    return Measured(Variant(changes, name, make_head().config, name), hits, rows)


@pytest.mark.parametrize(
    ("others", "as_configured", "otherwise", "candidates"),
    [
        ([("flag", 3.0, 0.2)], True, False, ["as configured"]),
        ([("flag", 2.01, 0.9)], True, False, ["as configured"]),  # alike: nothing speaks against it
        ([("flag", 1.0, 0.9)], False, True, ["flag"]),
        ([("flag", 1.0, 0.5)], False, False, ["flag"]),  # nearer, accepts no more: no verdict
        ([("flag", 1.0, 0.9), ("ids", 1.01, 0.9)], False, True, ["flag", "ids"]),  # either
    ],
)
def test_a_form_is_named_only_where_distance_and_acceptance_agree(others, as_configured, otherwise, candidates):
    forms = [measured("as configured", (), 2.0, 0.5)]
    forms += [measured(name, (name,), nats, accepted) for name, nats, accepted in others]
    verdict = Verdict(sorted(forms, key=lambda one: one.loss))
    assert (verdict.as_configured, verdict.otherwise) == (as_configured, otherwise)
    assert sorted(one.variant.name for one in verdict.candidates) == sorted(candidates)
    assert verdict.settles("flag") == (others[0][1] == 3.0)


@pytest.mark.parametrize("accepted", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("others", [[], [("flag", 2.01, 0.2)], [("flag", 9.0, 0.4)]])
def test_a_head_far_from_the_verifier_in_every_form_is_not_cleared(accepted, others):
    forms = [measured("as configured", (), 2.0, accepted), *(measured(name, (name,), *rest) for name, *rest in others)]
    said = report(Diagnosis([], [], Verdict(sorted(forms, key=lambda one: one.loss))))
    assert "Nothing speaks against" not in said
    assert "The weights were trained for: as configured" not in said
    best = max(accepted, *(rest[1] for _, *rest in others), 0.0)
    assert f"far from the verifier in every form tried (first position {best:.2f} at best" in said


@pytest.mark.parametrize("accepted", [0.3, 0.9])
@pytest.mark.parametrize("others", [[], [("flag", 2.01, 0.9)], [("flag", 1.0, 0.9)]])
def test_unknown_layers_are_never_confirmed(accepted, others):
    forms = [measured("as configured", (), 2.0, accepted), *(measured(name, (name,), *rest) for name, *rest in others)]
    verdict = Verdict(sorted(forms, key=lambda one: one.loss))
    said = report(Diagnosis([], [], verdict, names_layers=False))
    assert "The layers are unknown: only [1, 3, 4], which engines take unasked, one up and one down were tried" in said
    assert "Nothing speaks against" not in said
    assert "trained for" not in said


# on a trained head


@pytest.fixture(scope="module")
def trained_run(tmp_path_factory, tiny_verifier_folder) -> Run:
    """A run whose EAGLE-3 head knows its own conversations well."""
    run = Run(tmp_path_factory.mktemp("trained"), tiny_verifier_folder)
    run.options = ["data.sources=[{path:embedded,limit:600}]", "data.heldout_share=0.02", "synthesize.batch_size=50"]
    run.options += ["synthesize.max_tokens=48", "train.batch_tokens=512", "dump.shard_tokens=50000", "draft=eagle3"]
    run.options += [f"train.{name}=240" for name in ("max_steps", "save_every", "heldout_every")]
    for stage in ("synthesize", "dump", "train"):
        run(stage)
    return run


@pytest.fixture(scope="module")
def trained(trained_run) -> DraftHead:
    return load_head(trained_run.path / "training" / "checkpoints" / "step-240")[0]


@pytest.fixture(scope="module")
def config(verifier_config, trained_run) -> Config:
    """Opening turns of the head's own conversations."""
    questions = trained_run.folder / "questions.jsonl"
    with questions.open("w") as lines:
        for record in read_conversations(trained_run.path / "conversations"):
            if record["messages"][0]["role"] == "user" and record["finish_reasons"][0] != "length":
                question = {"question_id": record["id"], "turns": [record["messages"][0]["content"]]}
                lines.write(json.dumps(question) + "\n")
    config = Config(name="run", verifier=verifier_config)
    config.evaluate.questions = str(questions)
    config.doctor.num_prompts, config.doctor.max_tokens = 80, 48
    return config


@pytest.fixture(scope="module")
def texts(config, trained) -> list[Text]:
    return answers(config, list(range(8)), trained.target_ids)


def verdict_on(folder: Path, config: Config, texts: list[Text], **changes: Any) -> Verdict:
    """Measure the head of a folder whose config.json says otherwise than it was trained."""
    values = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in values.items() if v is not None}))
    weights = VerifierWeights(config.verifier)
    files = read_files(folder, load_config(config.verifier), weights=weights)
    head = readable_head(files)
    return compare(head, variants(files, head.config), texts, weights.embedding(), torch.device("cpu"))


def test_a_head_is_trained_for_what_it_was_trained_for(tmp_path, trained, config, texts):
    save_head(tmp_path, trained, {}, torch.float32)
    verdict = verdict_on(tmp_path, config, texts)
    assert verdict.as_configured
    assert verdict.measured[0].variant.changes == (), "no form is nearer than the true one"
    assert all(verdict.settles(change) for change in ("aux", "norm_before_residual", "norm_output"))


BOTH_IDS = f"eagle_config.{IDS}: [1, 3, 4], {IDS} at the top level: [2, 4, 5]"


@pytest.mark.parametrize(
    ("changes", "cure"),
    [
        ({"eagle_config": {IDS: [0, 2, 3]}, IDS: [1, 3, 4]}, BOTH_IDS),
        ({"norm_before_residual": True}, "norm_before_residual: false"),
        ({"norm_output": True}, "norm_output: false"),
        (
            {"eagle_config": {IDS: [0, 2, 3]}, IDS: [1, 3, 4], "norm_before_residual": True},
            f"{BOTH_IDS}, norm_before_residual: false",
        ),
    ],
    ids=["aux", "norm_before_residual", "norm_output", "aux and norm_before_residual"],
)
def test_the_form_a_head_was_trained_for_is_measured(tmp_path, trained, config, texts, changes, cure):
    save_head(tmp_path, trained, {}, torch.float32)
    verdict = verdict_on(tmp_path, config, texts, **changes)
    assert verdict.otherwise
    assert verdict.candidates[0].variant.cure == cure
    assert verdict.aux_layers == [1, 3, 4]


def in_pairs(folder: Path, head_dim: int) -> None:
    """Reorder q and k as they are if trained with neighbouring dimensions rotated as pairs."""
    tensors, order = load_file(folder / "model.safetensors"), torch.arange(head_dim).view(2, -1).T.flatten()
    for name in tensors:
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensors[name] = tensors[name].unflatten(0, (-1, head_dim))[:, order].flatten(0, 1).contiguous()
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"model_type": "llama4_text"}, {"norm_before_residual": True}])
def test_interleaved_rotation_is_measured(tmp_path, trained, config, texts, changes):
    save_head(tmp_path, trained, {}, torch.float32)
    in_pairs(tmp_path, trained.config.head_dim)
    verdict = verdict_on(tmp_path, config, texts, **changes)
    if "norm_before_residual" not in changes:
        assert verdict.otherwise
        assert [one.variant.changes for one in verdict.candidates] == [("pairs",)]
    config = replace(config, head_import=HeadImportConfig(source=str(tmp_path), interleaved_rotary=True))
    head = read_published_head(tmp_path, load_config(config.verifier), config.head_import).head
    assert torch.equal(head.layers[0].self_attn.k_proj.weight, trained.layers[0].self_attn.k_proj.weight)


@pytest.mark.slow
def test_the_command_names_interleaved_rotation_and_its_cure(tmp_path, trained, config):
    save_head(tmp_path, trained, {}, torch.float32)
    in_pairs(tmp_path, trained.config.head_dim)
    config = replace(config, head_import=HeadImportConfig(source=str(tmp_path)))
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["trained_otherwise"]
    assert diagnosis.findings[0].cure.startswith("import it with head_import.interleaved_rotary=true")
    config.head_import.interleaved_rotary = True
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["pairs"]
    assert "The weights were trained for: as configured." in report(diagnosis)


def test_an_absent_flag_in_speculators_format_is_measured(tmp_path, trained, config, texts):
    save_speculators(tmp_path, trained, {}, torch.float32, {"name_or_path": "x", "architectures": []}, 3)
    verdict = verdict_on(tmp_path, config, texts, norm_before_residual=None)
    assert verdict.otherwise
    assert verdict.candidates[0].variant.cure == "norm_before_residual: false"


def test_the_command_names_the_form_and_a_second_run_finds_nothing(tmp_path, trained, config, texts, monkeypatch):
    save_head(tmp_path, trained, {}, torch.float32)
    values = json.loads((tmp_path / "config.json").read_text())
    config.head_import.source = str(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**values, "norm_before_residual": True}))
    diagnosis = diagnose(config)
    assert [finding.code for finding in diagnosis.findings] == ["trained_otherwise"]
    assert "write norm_before_residual: false; then run doctor again" in report(diagnosis)
    (tmp_path / "config.json").write_text(json.dumps(values))
    monkeypatch.setattr(measure, "answers", lambda *_: texts)  # as it has answered already
    diagnosis = diagnose(config)
    assert diagnosis.findings == []
    assert "The weights were trained for: as configured." in report(diagnosis)


@pytest.mark.slow
def test_an_unusual_numbering_is_no_finding_where_the_weights_were_trained_for_it(tmp_path, trained_run, config):
    run = Run(tmp_path, trained_run.verifier, options=trained_run.options)
    copy_parts(trained_run, run, "conversations")
    for stage in ("dump", "train"):
        run(stage, "draft.aux_layers=[2,4,5]")
    folder = tmp_path / "head"
    folder.mkdir()
    save_head(folder, load_head(run.path / "training" / "checkpoints" / "step-240")[0], {}, torch.float32)
    config.head_import.source = str(folder)
    assert diagnose(config).findings == []
    config.doctor.measure = False
    assert [finding.code for finding in diagnose(config).findings] == ["aux_one_off"]


def test_forms_share_the_heads_weights(trained):

    config = replace(
        trained.config, norm_before_residual=True, rope_parameters={"rope_type": "default", "rope_theta": 7}
    )
    formed = _in_form(trained, config)
    assert formed.fc.weight is trained.fc.weight
    assert formed.d2t is trained.d2t
    assert (formed.layers[0].norm_before_residual, trained.layers[0].norm_before_residual) == (True, False)
    positions = torch.arange(5)
    assert not torch.equal(formed.rotary(positions, EMBEDDING)[0], trained.rotary(positions, EMBEDDING)[0])
