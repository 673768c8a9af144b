"""acceptance.json and the report, of every kind of evaluation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from evaluations import evaluation, question_record
from fledge.conf.schema import EvaluateEngine
from fledge.eval.figures.plots import draw
from fledge.eval.figures.records import answered_records
from fledge.eval.figures.report import print_table, write_report
from fledge.eval.figures.results import questions_digest

QUESTIONS = [
    question_record([3, 3], [2], name="q/1"),
    question_record([0, 1, 2], name="q/2"),
    question_record([1], name="q/2b"),
    question_record([1, 1], [3, 0], name="q/3", category="stem"),
]


def reported(run: Path, capsys) -> tuple[str, str]:
    """Give report.md and what the terminal shows."""
    results = write_report(run / "evaluation", run / "training")
    print_table(results)
    return (run / "evaluation" / "report.md").read_text(), capsys.readouterr().out


def test_figures_of_the_parts_add_up_and_carry_their_interval_and_speed_up(tmp_path):
    results = evaluation(tmp_path / "run", QUESTIONS)
    assert (results["num_drafts"], results["num_accepted_tokens"]) == (11, 17)
    assert results["acceptance_length"] == 1 + 17 / 11
    assert results["macro_acceptance_length"] == pytest.approx(1 + (8 / 3 + 3 / 3 + 1 / 1 + 5 / 4) / 4)
    low, high = results["acceptance_length_interval"]
    assert 1 <= low < results["acceptance_length"] < high <= 4
    math, stem = (results["by_category"][name]["trained head"] for name in ("math", "stem"))
    assert math["num_drafts"] + stem["num_drafts"] == 11
    assert math["acceptance_length_interval"] is None, "three questions"
    assert stem["acceptance_length_interval"] is None, "one question"
    tokens, answers, rounds = 17 + 11 + 6, 6, 11
    assert results["verifier_alone_tokens_per_s"] == pytest.approx(10.0)
    assert results["tokens_per_s"] == pytest.approx(tokens / ((rounds + answers) / 8))
    assert results["speedup"] == pytest.approx(results["tokens_per_s"] / 10)
    assert stem["speedup"] == pytest.approx((9 + 2) / ((4 + 2) / 8) / 10)


def test_a_category_without_an_answer_has_no_figure_and_no_answer_at_all_is_an_error(tmp_path):
    unasked = question_record(name="q/9", category="charts") | {"left_out": "turn 1: it has images"}
    assert list(evaluation(tmp_path / "run", [*QUESTIONS, unasked])["by_category"]) == ["math", "stem"]
    with pytest.raises(ValueError, match=r"none was answered \(turn 1: it has images\): cure that, and delete"):
        evaluation(tmp_path / "none", [unasked])


@pytest.mark.parametrize(
    ("number", "options", "known"),
    [(10, {}, True), (6, {}, True), (5, {}, False), (1, {}, False), (10, {"batch_size": 2}, False)],
)
def test_a_categorys_speed_up_is_told_with_its_interval_or_not_at_all(tmp_path, capsys, number, options, known):
    records = [
        question_record([i % 4, 3], [i % 3], name=f"{category}/{i}", category=category)
        for category, size in (("math", number), ("stem", 12))
        for i in range(size)
    ]
    results = evaluation(tmp_path / "run", records, **options)
    math = results["by_category"]["math"]["trained head"]
    _, out = reported(tmp_path / "run", capsys)
    (shown,) = re.findall(r"^\| math +\|(?:[^|]*\|){2} +([^|]*?) \|", out, re.M)
    if known:
        low, high = math["speedup_interval"]
        assert low <= math["speedup"] <= high
        assert shown == f"{math['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
    else:
        assert (math["speedup_interval"], shown) == (None, "-")
    (of_all,) = re.findall(r"^\| trained head +\|(?:[^|]*\|){6} +([\d.]+x)[^|]* \|", out, re.M)
    assert of_all == f"{results['speedup']:.2f}x"


def test_a_figure_comes_with_what_it_depends_on(tmp_path):
    greedy = evaluation(tmp_path / "greedy", QUESTIONS, batch_size=4)
    assert (greedy["drafting"], greedy["temperature"], greedy["batch_size"]) == ("chain", 0.0, 4)
    assert (greedy["dtype"], greedy["engine"], greedy["verifier"]["chat_template"]) == (
        "bfloat16",
        "transformers",
        "t1",
    )
    assert greedy.keys().isdisjoint({"tree_depth", "top_p", "draft_sampling", "by_modality"})
    assert greedy["lossless"] == {"decoded_answers": 6, "equal_to_verifier": 6}
    sampled = evaluation(tmp_path / "sampled", QUESTIONS, temperature=1.0, top_p=0.9, top_k=5)
    assert [sampled[name] for name in ("temperature", "top_p", "top_k", "draft_sampling")] == [1.0, 0.9, 5, "greedy"]


def test_a_tree_is_told_by_depth_and_its_shape_is_named(tmp_path, capsys):
    records = [question_record([4, 0], [5], name=f"q/{i}", drafted=60) for i in range(3)]
    results = evaluation(tmp_path / "run", records, num_draft_tokens=60, tree_depth=5)
    assert (results["drafting"], results["tree_depth"], results["tree_top_k"]) == ("tree", 5, 8)
    assert (results["num_draft_tokens_per_round"], results["num_draft_tokens"]) == (60, 540)
    assert results["num_accepted_tokens_per_pos"] == [6, 6, 6, 6, 3]
    report, out = reported(tmp_path / "run", capsys)
    assert "60 draft tokens a round (tree of depth 5, top 8)" in report
    assert "position 5" in out
    assert "position 6" not in out


def test_a_server_leaves_open_what_it_cannot_tell(tmp_path, capsys):
    records = [question_record([3, 1], [0], name=f"q/{i}", server=True) for i in range(4)]
    results = evaluation(tmp_path / "run", records, engine=EvaluateEngine.server, endpoint="http://h/v1")
    assert results["acceptance_length"] == 1 + 4 / 3
    assert results["verifier_alone_tokens_per_s"] is None
    assert (results["speedup"], results["speedup_interval"]) == (None, None)
    assert "lossless" not in results
    _, out = reported(tmp_path / "run", capsys)
    assert "verifier alone" not in out
    assert "equal the verifier's own" not in out
    assert re.search(
        r"\| trained head +\| +2\.33 \| +\[2\.33, 2\.33\] \| +0\.67 \| +0\.33 \| +0\.33 \| +\d+ \| +- \|", out
    )


def test_a_server_without_the_head_has_a_speed_and_no_positions(tmp_path, capsys):
    records = [question_record([0], name=f"q/{i}", drafted=0, server=True) for i in range(4)]
    by_server = {"engine": EvaluateEngine.server, "endpoint": "http://h/v1", "batch_size": 2}
    results = evaluation(tmp_path / "run", records, num_draft_tokens=0, **by_server)
    assert (results["acceptance_length"], results["num_accepted_tokens_per_pos"]) == (1.0, [])
    assert results["tokens_per_s"] == pytest.approx(8.0)
    _, out = reported(tmp_path / "run", capsys)
    assert re.search(r"\| trained head +\| +1\.00 \| ", out)


def test_text_and_images_are_told_apart_where_a_question_has_images(tmp_path, capsys):
    records = [*QUESTIONS, question_record([0, 0], name="q/4", images=2)]
    results = evaluation(tmp_path / "run", records)
    text, images = (results["by_modality"][name]["trained head"] for name in ("text", "images"))
    assert (text["num_drafts"], text["acceptance_length"]) == (11, 1 + 17 / 11)
    assert (images["num_drafts"], images["acceptance_length"]) == (2, 1.0)
    report, _ = reported(tmp_path / "run", capsys)
    assert "| questions with |" in report
    assert "| images " in report


def test_the_report_states_conditions_intervals_and_conditional_acceptance_and_shows_its_plots(tmp_path, capsys):
    results = evaluation(tmp_path / "run", QUESTIONS)
    report, out = reported(tmp_path / "run", capsys)
    low, high = results["acceptance_length_interval"]
    assert report.startswith(f"# Acceptance length 2.55 [{low:.2f}, {high:.2f}]\n")
    for words in (
        "4 questions (q.jsonl)",
        "3 draft tokens a round (chain)",
        "temperature 0",
        "bfloat16",
        "template (t1)",
    ):
        assert words in report
    given = results["conditional_acceptance_rate_per_pos"]
    assert given == [9 / 11, 5 / 9, 3 / 5]
    assert re.search(r"\| trained head, conditional +\| +- \| +- \| +0\.82 \| +0\.56 \| +0\.60 \|", out)
    assert f"the mean over questions (macro) is {results['macro_acceptance_length']:.2f}" in out
    plots = re.findall(r"\]\((\w+\.png)\)", report)
    assert plots == ["positions.png", "categories.png", "questions.png"]
    assert all((tmp_path / "run" / "evaluation" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


def test_plots_are_drawn_of_a_single_question_without_rounds(tmp_path):
    results = evaluation(tmp_path / "run", [question_record([])])
    assert results["acceptance_length_interval"] is None
    assert len(draw(tmp_path, results, answered_records(tmp_path / "run" / "evaluation"), [])) == 3


def test_the_same_questions_have_one_name_wherever_they_were_read():
    renamed = [{**record, "id": f"hub/{number}"} for number, record in enumerate(QUESTIONS)]
    assert questions_digest(renamed[::-1]) == questions_digest(QUESTIONS)
    assert questions_digest(QUESTIONS[:2]) != questions_digest(QUESTIONS)
