"""The whole pipeline on the tiny verifier, and what it leaves behind."""

import json

import torch
from fledge.conf.cli import main
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.runtime.journal import read_journal
from fledge.data_synthesis.conversations import read_conversations
from fledge.data_synthesis.heldout import is_heldout
from fledge.models.formats.plain import load_head
from fledge.models.formats.training_folder import head_folder


def best(run):
    return head_folder("best", run.path / "training")


def test_a_finished_run_is_skipped_stage_by_stage(finished):
    stamps = {
        p: p.stat().st_mtime_ns
        for p in finished.path.rglob("*")
        if p.is_file() and p.suffix in (".safetensors", ".jsonl")
    }
    out = finished("run").stdout
    for words in ("conversations: ", "hidden states: ", "training: ", "export: "):
        assert any(line.startswith(words) and line.endswith("is complete") for line in out.splitlines()), out
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_a_run_records_which_kernels_it_used_and_is_known_whatever_is_said_of_them(finished):
    used = {"training": ["attention"], "evaluation": ["choose", "join", "way"]}
    for stage, names in used.items():
        record = read_manifest(finished.path / stage, stage)["kernels"]
        assert record == {name: {"used": False, "reason": "no GPU"} for name in names}
    assert "is complete" in finished("train", "train.triton=false").stdout
    refused = finished("train", "train.triton=true", code=2).stderr
    assert "train.triton=true needs a GPU and Triton, and there is no GPU: set it to auto" in refused


def test_conversations_hold_every_prompt_once_answered_turn_by_turn(finished):
    records = list(read_conversations(finished.path / "conversations"))
    ids = [record["id"] for record in records]
    assert len(ids) == len(set(ids)) == 64
    assert any(is_heldout(i, 0.25) for i in ids)
    assert not all(is_heldout(i, 0.25) for i in ids)
    for record in records:
        assert {"id", "source", "messages", "finish_reasons", "usage", "sequences"} < record.keys()
        assert len(record["finish_reasons"]) == len(record["messages"]) / 2
    assert any(len(record["messages"]) == 4 for record in records)


def test_acceptance_json_has_vllms_names_and_adds_up(finished):
    results = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())
    assert results["num_draft_tokens_per_round"] == 3
    assert results["temperature"] == 0
    assert results["num_accepted_tokens"] == sum(results["num_accepted_tokens_per_pos"])
    assert results["num_draft_tokens"] == 3 * results["num_drafts"]
    assert results["acceptance_length"] == 1 + results["num_accepted_tokens"] / results["num_drafts"]
    by_category = [counts["trained head"] for counts in results["by_category"].values()]
    assert len(by_category) == 8
    for name in ("num_drafts", "num_accepted_tokens", "num_output_tokens"):
        assert results[name] == sum(counts[name] for counts in by_category)
    assert results["acceptance_length"] > 1.2, "the head accepts something, or nothing is shown"
    assert results["baselines"].keys() == {"untrained head", "prompt lookup"}


def test_every_answer_equals_the_verifiers_own(finished):
    lossless = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())["lossless"]
    assert lossless["decoded_answers"] >= 8 * 2 * 3
    assert lossless["equal_to_verifier"] == lossless["decoded_answers"]


def test_walked_acceptance_equals_decoded_but_for_last_rounds(finished):
    heldout = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())["heldout"]
    assert heldout["num_conversations"] >= 4
    walked, decoded = heldout["walked_acceptance_length"], heldout["decoded"]["acceptance_length"]
    assert walked > 1.2, "the head accepts something, or nothing is shown"
    assert abs(walked - decoded) < 0.1


def test_decoded_rounds_equal_walked_rounds_but_for_each_answers_last(finished):
    walks = json.loads((best(finished) / "heldout_walks.json").read_text())["3"]
    records = list(read_journal(finished.path / "evaluation" / "questions.jsonl"))
    heldout = [record for record in records if record["category"] == "heldout"]
    assert len(heldout) >= 4
    for record in heldout:
        rounds = [answer["drafters"]["trained head"]["accepted"] for answer in record["answers"]]
        assert walks[record["id"]]["rounds"] == sum(map(len, rounds))
        before_last = sum(sum(accepted[:-1]) for accepted in rounds)
        at_most = before_last + sum(accepted[-1] for accepted in rounds if accepted)
        assert before_last <= walks[record["id"]]["accepted"] <= at_most


def test_report_shows_its_plots(finished):
    folder = finished.path / "evaluation"
    report = (folder / "report.md").read_text()
    for name in ("training.png", "positions.png", "categories.png", "questions.png"):
        assert f"({name})" in report
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    for row in ("trained head ", "trained head, conditional ", "verifier alone ", "humanities "):
        assert f"| {row}" in report


def test_speed_and_intervals_are_told_of_every_drafter(finished):
    results = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())
    for counts in (results, *results["baselines"].values()):
        low, high = counts["acceptance_length_interval"]
        assert low <= counts["acceptance_length"] <= high
        assert counts["speedup"] == counts["tokens_per_s"] / results["verifier_alone_tokens_per_s"]


def test_a_finished_run_is_compared_without_its_verifier(finished, capsys):
    results = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())
    main(["compare", finished.name, f"runs_dir={finished.folder}"])
    out = capsys.readouterr().out
    assert f"| {finished.name} " in out
    assert f" {results['acceptance_length']:.2f} " in out
    assert results["verifier"]["chat_template"] in out


def test_export_is_the_best_checkpoint_in_bfloat16(finished):
    head, record = load_head(best(finished))
    exported, same = load_head(finished.path / "exports" / "plain")
    assert record == same
    for name, weight in head.state_dict().items():
        assert torch.equal(weight.bfloat16().float(), exported.state_dict()[name])
    config = json.loads((finished.path / "exports" / "plain" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"


def test_an_exported_head_shows_its_acceptance_and_its_data(finished):
    results = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())
    card = (finished.path / "exports" / "plain" / "README.md").read_text()
    assert f"| all | {results['acceptance_length']:.2f} |" in card
    assert "Trained with fledge" in card
    assert "- embedded/train: 64 conversations" in card


def test_a_head_that_went_through_export_and_import_accepts_the_same_tokens(finished, run):
    trained = best(finished)
    run("export", f"export.checkpoint={trained}", "export.format=speculators", "export.dtype=float32")
    run("import", f"head_import.source={run.path / 'exports' / 'speculators'}")
    run("evaluate", f"evaluate.checkpoint={run.path / 'imports' / 'speculators'}", "evaluate.baselines=false")
    mine, theirs = (json.loads((r.path / "evaluation" / "acceptance.json").read_text()) for r in (run, finished))
    for name in ("num_drafts", "num_accepted_tokens_per_pos", "num_output_tokens"):
        assert mine[name] == theirs[name]
