"""Acceptance over time: lines of a file, and the first of the kind as the measure."""

from __future__ import annotations

import json

import pytest
from fledge.eval.figures.history import add_to_history

FIRST = {
    "acceptance_length": 2.5,
    "acceptance_length_interval": [2.4, 2.6],
    "num_draft_tokens_per_round": 3,
    "temperature": 0.0,
    "questions_digest": "a",
}


def test_an_evaluation_is_compared_with_the_first_of_its_kind_and_noted_once(tmp_path):
    path = tmp_path / "of all" / "history.jsonl"
    assert "first of its kind" in add_to_history(path, "monday", FIRST)
    assert "first of its kind" in add_to_history(path, "more", {**FIRST, "num_draft_tokens_per_round": 7})
    said = [
        add_to_history(path, f"day {n}", {**FIRST, "acceptance_length": length})
        for n, length in enumerate((2.41, 2.39, 2.61))
    ]
    assert "lies within the interval [2.40, 2.60] of monday" in said[0]
    assert "lies below" in said[1]
    assert "adapt" in said[1]
    assert "lies above" in said[2]
    assert add_to_history(path, "day 1", {**FIRST, "acceptance_length": 2.39}) == said[1]
    path.write_bytes(path.read_bytes() + b'{"id": "torn')
    add_to_history(path, "day 3", FIRST)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["monday", "more", "day 0", "day 1", "day 2", "day 3"]
    assert all(line["time"].endswith("Z") for line in lines)
    assert "lies below" in add_to_history(path, "monday", {**FIRST, "acceptance_length": 1.5}), (
        "once more, another head"
    )
    assert "first of its kind" in add_to_history(path, "tree", {**FIRST, "drafting": "tree", "tree_depth": 3})
    assert "first of its kind" in add_to_history(path, "tree", {**FIRST, "drafting": "tree", "tree_depth": 7})
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()][6:] == ["monday", "tree", "tree"]


def test_few_questions_have_no_interval_and_another_file_is_refused(tmp_path):
    path = tmp_path / "history.jsonl"
    alone = {**FIRST, "acceptance_length_interval": None}
    add_to_history(path, "monday", alone)
    assert add_to_history(path, "tuesday", alone).endswith("2.50, monday had 2.50")
    assert "first of its kind" in add_to_history(path, "monday", alone), "asked again, it is no other one's follower"
    path.write_text(path.read_text().rstrip("\n"))  # as some editors save it
    add_to_history(path, "wednesday", alone)
    assert len(path.read_text().splitlines()) == 3
    assert "first of its kind" in add_to_history(path, "drawn", {**alone, "draft_sampling": "sampled"})
    assert "first of its kind" in add_to_history(path, "other", {**alone, "verifier": "another"})
    path.write_text("no history")
    with pytest.raises(ValueError, match="is no history of evaluations: its last line is b'no history'"):
        add_to_history(path, "wednesday", alone)
    assert path.read_text() == "no history"
    path.write_text("no history\n")
    with pytest.raises(ValueError, match="line 1 is malformed"):
        add_to_history(path, "wednesday", alone)
