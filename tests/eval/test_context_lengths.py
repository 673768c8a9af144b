"""The same questions behind documents, at several context lengths."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fledge.conf.runtime.journal import read_journal
from fledge.conf.schema import Config, Device, DraftConfig, Dtype, EvaluateConfig, VerifierConfig
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.eval.evaluate import evaluate
from fledge.eval.questions.question import load_questions
from fledge.eval.questions.reader import at_context_lengths
from fledge.models.formats.plain import save_head
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead
from fledge.models.verifier.config import load_config, load_tokenizer
from fledge.models.verifier.weights import verifier_identity

VERIFIER = VerifierConfig(path="embedded", dtype=Dtype.float32, device=Device.cpu)
TEXT = " ".join(f"The {n}th visitor of the museum asked for the way to room {n * 7 % 30}." for n in range(400))
LENGTHS = [64, 160]


def asking(folder: Path, **options: object) -> Config:
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": TEXT[at : at + 500]}) + "\n" for at in (0, 500, 1000))
    )
    (folder / "text.txt").write_text(TEXT)
    options = {"questions": "embedded", "questions_per_category": 2, "max_tokens": 16, "heldout_prompts": 0, **options}
    config = Config(name="run", runs_dir=str(folder), verifier=VERIFIER, evaluate=EvaluateConfig(**options))
    config.tracking.wandb = config.tracking.wandb.disabled
    return config


def _alike(prompts: list[list[int]]) -> int:
    """How many first tokens all prompts share."""
    return next(n for n, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)


@pytest.mark.parametrize("documents", ["rows.jsonl", "text.txt"])
def test_prompt_and_answer_reach_the_length_and_prompts_begin_alike(tmp_path, documents):
    config = asking(tmp_path, context_lengths=LENGTHS, context_documents=str(tmp_path / documents))
    questions, tokenizer = load_questions(config.evaluate), load_tokenizer(VERIFIER)
    asked = at_context_lengths(config, questions)
    assert [question.category for question in asked] == [f"context {n}" for n in LENGTHS for _ in questions]
    assert len({question.id for question in asked}) == len(asked)
    for length in LENGTHS:
        here = [pair for pair in zip(itertools.cycle(questions), asked) if pair[1].id.endswith(f"@{length}")]
        own, prompts = (
            [prompt_tokens(tokenizer, pair[place].history([])) for pair in here if not pair[1].problem]
            for place in (0, 1)
        )
        room = length - config.evaluate.max_tokens - 16
        assert len(prompts) > 6
        assert all(room - 4 <= len(prompt) <= room for prompt in prompts), [len(prompt) for prompt in prompts]
        assert _alike(prompts) >= room - max(map(len, own)), "a server reads documents once"
    for question, same in zip(itertools.cycle(questions), asked, strict=False):
        assert same.turns[0].endswith(question.turns[0])
        assert len(same.turns) == 1


def test_the_same_is_asked_for_any_number_of_draft_tokens_and_images_are_left_out(tmp_path):
    shared = {"context_lengths": LENGTHS, "context_documents": str(tmp_path / "text.txt")}
    config = asking(tmp_path, **shared)
    questions = load_questions(config.evaluate)
    asked = at_context_lengths(config, questions)
    assert at_context_lengths(asking(tmp_path, num_draft_tokens=0, **shared), questions) == asked
    assert at_context_lengths(asking(tmp_path, num_draft_tokens=7, **shared), questions) == asked
    pictured = [replace(question, images=("a.png",)) for question in questions]
    assert {question.problem for question in at_context_lengths(config, pictured)} == {
        "it has images, whose tokens no document makes room for"
    }


def test_a_question_that_a_length_does_not_hold_is_left_out_by_name(tmp_path):
    rows = [{"prompt": "What is the way?"}, {"prompt": TEXT[:800]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = asking(
        tmp_path,
        questions=str(tmp_path / "q.jsonl"),
        questions_per_category=None,
        context_lengths=[100],
        context_documents=str(tmp_path / "text.txt"),
    )
    short, long = at_context_lengths(config, load_questions(config.evaluate))
    assert (short.problem, long.problem) == ("", "it and an answer of 16 tokens do not fit into a context of 100")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "evaluate.context_documents is required, there are no conversations in "),
        ({"context_documents": "{}/rows.jsonl", "context_lengths": [2000]}, "do not fill a context of 2000"),
        ({"context_documents": "{}/bad.jsonl"}, r"bad\.jsonl line 2 has no field `text` with a text in it"),
    ],
)
def test_documents_that_are_missing_too_few_or_of_another_form_are_refused(tmp_path, options, message):
    (tmp_path / "bad.jsonl").write_text('{"text": "a few words"}\n{"prompt": "x"}\n')
    options = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in options.items()}
    config = asking(tmp_path, **{"context_lengths": [100], **options})
    with pytest.raises(ValueError, match=message):
        at_context_lengths(config, load_questions(config.evaluate))


def test_figures_are_by_length_and_answers_the_verifiers_own(tmp_path):
    config = asking(
        tmp_path,
        context_lengths=LENGTHS,
        context_documents=str(tmp_path / "text.txt"),
        baselines=False,
        batch_size=4,
    )
    head = DraftHead(DraftHeadConfig.from_verifier(DraftConfig(vocab_size=None), load_config(VERIFIER)))
    (tmp_path / "head").mkdir()
    save_head(tmp_path / "head", head, {"verifier": verifier_identity(VERIFIER)}, torch.float32)
    config.evaluate.checkpoint = str(tmp_path / "head")
    results = evaluate(config)
    assert list(results["by_category"]) == [f"context {n}" for n in LENGTHS]
    assert results["lossless"]["decoded_answers"] == results["lossless"]["equal_to_verifier"] > 4
    records = read_journal(config.run_folder / "evaluation" / "questions.jsonl")
    lengths = {r["category"]: r["answers"][0]["prompt_tokens"] for r in records if r["answers"]}
    assert 30 < lengths["context 64"] < 64 < 120 < lengths["context 160"] < 160
