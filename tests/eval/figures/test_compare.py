"""`fledge compare`: evaluations side by side, and what they do not have in common."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from evaluations import evaluation, question_record
from fledge.conf.cli import main, overrides_of
from fledge.conf.schema import Dtype
from fledge.eval.compare import published_rows

WORSE = [question_record([2, 0, 1], [1], name=f"q/{i}", category=("math", "stem")[i % 2]) for i in range(6)]
BETTER = [question_record([2, 1 + i % 2, 1], [1], name=f"q/{i}", category=("math", "stem")[i % 2]) for i in range(6)]


def compared(capsys, *arguments: str) -> str:
    main(["compare", *arguments])
    return capsys.readouterr().out


def fails(capfd, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(["compare", *arguments])
    assert exit_.value.code == 2
    # A library that this process imports first may have a line of its own.
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("fledge: error")]
    return line


def tables(text: str) -> list[dict[str, dict[str, str]]]:
    """Read Markdown tables as rows by their first cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        head, _, *rows = ([cell.strip() for cell in line[1:-1].split("|")] for line in block.splitlines())
        found.append({row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows})
    return found


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    evaluation(tmp_path / "first", WORSE)
    evaluation(tmp_path / "second", BETTER)
    return tmp_path


def test_runs_are_found_by_name_by_folder_and_by_evaluation(runs, capsys, monkeypatch):
    by_name = compared(capsys, "first", "second", f"runs_dir={runs}")
    assert compared(capsys, str(runs / "first"), str(runs / "second")) == by_name
    assert compared(capsys, str(runs / "first" / "evaluation"), str(runs / "second")) == by_name
    monkeypatch.chdir(runs)
    assert compared(capsys, "first", "second/") == by_name


def test_figures_stand_side_by_side_with_what_they_depend_on(runs, capsys):
    acceptance, categories, conditions = tables(compared(capsys, "first", "second", f"runs_dir={runs}"))
    results = json.loads((runs / "second" / "evaluation" / "acceptance.json").read_text())
    second = acceptance["second"]
    assert second["acceptance length"] == f"{results['acceptance_length']:.2f}"
    assert second["95 % interval"] == "[{:.2f}, {:.2f}]".format(*results["acceptance_length_interval"])
    assert [second[f"position {i}"] for i in (1, 2, 3)] == [f"{r:.2f}" for r in results["acceptance_rate_per_pos"]]
    assert second["tokens/s"] == f"{results['tokens_per_s']:.0f}"
    assert second["speed-up"] == "{:.2f}x [{:.2f}, {:.2f}]".format(results["speedup"], *results["speedup_interval"])
    for name in ("math", "stem"):
        length, base = (
            json.loads((runs / run / "evaluation" / "acceptance.json").read_text())["by_category"][name]["trained head"]
            for run in ("second", "first")
        )
        assert categories["second"][name] == f"{length['acceptance_length']:.2f}", "three questions have no interval"
        difference = length["acceptance_length"] - base["acceptance_length"]
        assert categories["second minus first"][name].startswith(f"{difference:+.2f}")
    told = ("draft tokens", "drafting", "temperature", "dtype", "questions", "template")
    assert [conditions["second"][name] for name in told] == [
        "3", "chain", "0", "bfloat16", f"6 of q.jsonl ({results['questions_digest'][:8]})", "t1"
    ]  # fmt: skip


def test_the_difference_from_the_first_run_is_of_the_same_questions(runs, capsys):
    acceptance, *_ = tables(compared(capsys, "first", "second", f"runs_dir={runs}"))
    assert acceptance["first"]["minus first"] == "-"
    worse, better = 1 + 24 / 24, 1 + (24 + 9) / 24
    told = re.fullmatch(r"([+-][\d.]+) \[([+-][\d.]+), ([+-][\d.]+)\]", acceptance["second"]["minus first"])
    difference, low, high = map(float, told.groups())
    assert told.group(1) == f"{better - worse:+.2f}"
    assert 0 < low < difference < high
    evaluation(runs / "third", [question_record([1], name=f"other/{i}") for i in range(6)])
    evaluation(runs / "half", [{**r, "answers": r["answers"][: 2 - (r is BETTER[0])]} for r in BETTER])
    acceptance, *_ = tables(compared(capsys, "first", "third", "half", f"runs_dir={runs}"))
    assert acceptance["third"]["minus first"] == acceptance["half"]["minus first"] == "-"


def test_questions_of_another_source_are_the_same_if_they_say_the_same(runs, capsys):
    evaluation(runs / "hub", [{**r, "id": f"hub/{i}"} for i, r in enumerate(BETTER[::-1])], questions="hub/q")
    acceptance, *_ = tables(compared(capsys, "first", "second", "hub", f"runs_dir={runs}"))
    assert acceptance["hub"]["minus first"] == acceptance["second"]["minus first"]


def test_questions_that_ask_the_same_are_compared_each_and_other_images_are_others(tmp_path, capsys):
    for name, shift, images in (("a", 0, "xyz"), ("b", 1, "xyz"), ("c", 1, "xyw")):
        records = [question_record([2, (i + shift) % 4, 1], name=f"q/{i}") for i in range(6)]
        told = [{**one, "turns": ["Describe it."], "images": [images[i % 3]]} for i, one in enumerate(records)]
        evaluation(tmp_path / name, told)
    acceptance, *_ = tables(compared(capsys, "a", "b", "c", f"runs_dir={tmp_path}"))
    gained = (sum((i + 1) % 4 for i in range(6)) - sum(i % 4 for i in range(6))) / 18
    assert acceptance["b"]["minus a"].startswith(f"{gained:+.2f} [")
    assert acceptance["c"]["minus a"] == "-"


def test_what_is_not_alike_is_said(runs, capsys):
    assert "Not alike" not in compared(capsys, "first", "second", f"runs_dir={runs}")
    evaluation(runs / "other", BETTER[:4], dtype=Dtype.float32, temperature=1.0, batch_size=8)
    tree = [question_record([4], [5], name=f"q/{i}", drafted=60) for i in range(6)]
    evaluation(runs / "tree", tree, num_draft_tokens=60, tree_depth=5)
    lines = [
        line
        for line in compared(capsys, "first", "other", "tree", f"runs_dir={runs}").splitlines()
        if line.startswith("Not alike: ")
    ]
    assert [line.split(" differs ")[0] for line in lines] == ["Not alike: other", "Not alike: tree"]
    for words in (
        "temperature 1, drafts greedy (0)",
        "dtype float32 (bfloat16)",
        "questions 4 of q.jsonl",
        "batch 8 (1)",
    ):
        assert words in lines[0]
    for words in ("draft tokens 60 (3)", "drafting tree of depth 5, top 8 (chain)"):
        assert words in lines[1]
    assert "temperature" not in lines[1]


def test_published_figures_stand_below_with_their_source(runs, capsys):
    out = compared(capsys, "first", f"runs_dir={runs}")
    acceptance, categories, conditions = tables(out)
    assert list(acceptance) == [
        "first",
        "NVIDIA's card, Maverick",
        "vLLM, Maverick, text",
        "vLLM, Maverick, multimodal",
    ]
    vllm = acceptance["vLLM, Maverick, text"]
    assert [vllm["acceptance length"], *(vllm[f"position {i}"] for i in (1, 2, 3))] == ["2.53", "0.71", "0.48", "0.34"]
    assert acceptance["vLLM, Maverick, multimodal"]["acceptance length"] == "2.12"
    assert acceptance["NVIDIA's card, Maverick"]["acceptance length"] == "-"
    assert categories["NVIDIA's card, Maverick"]["coding"] == "2.27"
    assert {row["draft tokens"] for row in conditions.values()} == {"3"}
    assert "layer ids one too low" in out
    assert "MT-Bench at draft length 3" in out
    assert "Maverick" not in compared(capsys, "first", f"runs_dir={runs}", "compare.published=false")


def test_text_and_images_have_rows_of_their_own(runs, capsys):
    records = [*BETTER, *(question_record([0, 1], name=f"seen/{i}", images=1) for i in range(4))]
    evaluation(runs / "seen", records)
    acceptance, categories, _ = tables(compared(capsys, "first", "seen", f"runs_dir={runs}", "compare.published=false"))
    assert list(acceptance) == ["first", "seen", "seen, text", "seen, images"]
    assert acceptance["seen, images"]["acceptance length"] == "1.50"
    acceptance, *_ = tables(compared(capsys, str(runs / "seen"), str(runs / "second"), "compare.published=false"))
    assert acceptance["seen, text"]["acceptance length"] == acceptance["second"]["acceptance length"]
    assert list(categories) == ["first", "seen", "seen minus first"]


def test_a_speed_up_without_an_interval_is_told_of_all_questions_only(runs, capsys):
    evaluation(runs / "seen", [*BETTER, *(question_record([0, 1], name=f"seen/{i}", images=1) for i in range(4))])
    evaluation(runs / "batched", BETTER, batch_size=2)
    written = runs / "first" / "evaluation" / "acceptance.json"  # by a fledge that told no intervals of speed-ups
    old = json.loads(written.read_text())
    written.write_text(json.dumps({name: value for name, value in old.items() if name != "speedup_interval"}))
    shown, *_ = tables(compared(capsys, "first", "batched", "seen", f"runs_dir={runs}", "compare.published=false"))
    plain, bounded = r"\d\.\d\dx", r"\d\.\d\dx \[\d\.\d\d, \d\.\d\d\]"
    for name, form in {
        "first": plain, "batched": plain, "seen": bounded, "seen, text": bounded, "seen, images": "-"
    }.items():  # fmt: skip
        assert re.fullmatch(form, shown[name]["speed-up"]), name


def test_vllms_published_positions_add_up_to_its_acceptance_length():
    (text,) = [row for row in published_rows() if row.rates]
    assert 1 + sum(text.rates) == pytest.approx(text.acceptance_length)


HEAVY = {"torch", "transformers", "deepspeed", "accelerate", "wandb", "matplotlib", "datasets"}


@pytest.mark.parametrize(
    "arguments", [["compare", "first"], ["status", "first"], ["--help"]], ids=lambda given: given[0]
)
def test_commands_that_only_read_files_load_no_large_library(runs, arguments):
    options = [f"runs_dir={runs}"] if arguments[-1] == "first" else []
    code = f"import sys; from fledge.conf.cli import main; main({[*arguments, *options]}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_a_comparison_is_written_where_it_is_asked_for(runs, capsys):
    out = compared(capsys, "first", "second", f"runs_dir={runs}", f"compare.folder={runs / 'a' / 'b'}")
    written = (runs / "a" / "b" / "compare.md").read_text()
    assert tables(written) == tables(out)
    assert "](compare.png)" in written
    assert (runs / "a" / "b" / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart(runs, tmp_path, capsys):
    shutil.copytree(runs / "second", tmp_path / "old" / "first")
    paths = str(runs / "first"), str(tmp_path / "old" / "first")
    acceptance, *_ = tables(compared(capsys, *paths, "compare.published=false"))
    assert tuple(acceptance) == paths


def walked(run: Path, hits: list[int], share: float = 0.5) -> None:
    """A training whose one checkpoint accepted so many tokens in the two rounds of each held-out conversation."""
    checkpoint = run / "training" / "checkpoints" / "step-7"
    checkpoint.mkdir(parents=True)
    counts = {f"c/{n}": {"rounds": 2, "accepted": hit, "rows": 4, "expected": 4 * share} for n, hit in enumerate(hits)}
    counts |= {"c/0##2": {"rounds": 2, "accepted": 0, "rows": 4, "expected": 4 * share}}  # one with c/0
    (checkpoint / "heldout_walks.json").write_text(json.dumps({"3": counts, "7": counts}))


def test_trainings_are_compared_without_an_evaluation_with_paired_intervals(runs, capsys):
    hits = [n % 5 for n in range(30)]
    walked(runs / "a", hits)
    walked(runs / "b", [hit + (n % 3 > 0) for n, hit in enumerate(hits)], share=0.75)
    walked(runs / "c", hits[1:])
    greedy, estimated = tables(compared(capsys, "a", "b", "c", f"runs_dir={runs}"))
    assert [greedy[name]["held out"] for name in "abc"] == ["30", "30", "29"]
    length, low, high = map(float, re.findall(r"[\d.]+", greedy["a"]["3 draft tokens"]))
    assert length == pytest.approx(1 + 60 / 62, abs=1e-3)
    assert 1 <= low < length < high <= 4
    more, least, most = map(float, re.findall(r"[-+][\d.]+", greedy["b"]["minus a"]))
    assert more == pytest.approx(20 / 62, abs=1e-3)
    assert 0 < least < more < most < high - low, "a pair is closer than two"
    assert [greedy[name]["minus a"] for name in "ac"] == ["-", "-"]
    assert estimated["b"]["7 draft tokens"].startswith("1.750 ")
    assert estimated["b"]["minus a"].startswith("+0.250 ")


def test_trainings_stand_above_evaluations(runs, capsys):
    walked(runs / "first", [1, 2, 3, 4])
    greedy, _, acceptance, *_ = tables(compared(capsys, "first", "second", f"runs_dir={runs}"))
    assert list(greedy) == ["first"]
    assert "minus first" not in greedy["first"]
    assert {"first", "second"} <= acceptance.keys()


def test_an_evaluation_that_is_missing_or_not_complete_is_named_with_the_command_to_run(runs, tmp_path, capfd):
    message = fails(capfd, "first", "gone", f"runs_dir={runs}")
    assert re.search(
        r"compare\.runs: gone has neither an evaluation nor a training \(looked in gone, .*/gone\)", message
    )
    assert "run `fledge evaluate` first" in message
    evaluation(runs / "begun", WORSE, finished=False)
    assert "is not complete: run `fledge evaluate` again" in fails(capfd, "begun", f"runs_dir={runs}")
    (runs / "second" / "evaluation" / "acceptance.json").unlink()
    assert "acceptance.json is missing: run `fledge evaluate` again" in fails(capfd, "second", f"runs_dir={runs}")
    assert "compare.runs is required: fledge compare RUN" in fails(capfd, f"runs_dir={runs}")
    (runs / "bare" / "training" / "checkpoints" / "step-7").mkdir(parents=True)
    assert "bare has neither an evaluation nor held-out" in fails(capfd, "first", "bare", f"runs_dir={runs}")


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["a", "b"], ["name=compare", "verifier.path=recorded", "compare.runs=['a','b']"]),
        (["it's", "x=1"], ["name=compare", "verifier.path=recorded", "x=1", "compare.runs=['it\\'s']"]),
        (["a", "--cfg", "job"], ["name=compare", "verifier.path=recorded", "--cfg", "job", "compare.runs=['a']"]),
        (["experiment=demo", "name=n"], ["experiment=demo", "name=n"]),
    ],
)
def test_arguments_without_a_name_are_runs(arguments: list[str], overrides: list[str], tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert overrides_of("compare", arguments) == overrides


def test_runs_with_odd_names_reach_the_command_as_they_are(tmp_path, capsys):
    names = ["it's, [odd] {x}", "lr=3e-4"]
    for name in names:
        evaluation(tmp_path / name, WORSE)
    paths: list[Any] = [str(tmp_path / name) for name in names]
    acceptance, *_ = tables(compared(capsys, *paths, "compare.published=false"))
    assert list(acceptance) == names
