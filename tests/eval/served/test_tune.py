"""`fledge tune`: where rounds cost what is known, it finds the draft tokens that pay, and says so to each engine."""

import json

import numpy as np
import pytest
from evaluations import evaluation, question_record
from fledge.conf.schema import Config, EvaluateEngine, TuneConfig
from fledge.eval.served.tune import settings, speeds_of, tune
from omegaconf import OmegaConf

RATES = [0.7, 0.5, 0.35, 0.25, 0.18]
GAIN = 1 + np.cumsum([0.0, *RATES])


def round_s(batch_size: int, depth: int) -> float:
    """Linear in both, as is assumed in between: a forward, each token it reads, and the head's steps."""
    return 0.0213 + 0.001 * batch_size * (depth + 1) + 0.002 * depth


def told(batch_size: int, depth: int, alone: bool = False) -> dict:
    speed = [batch_size * GAIN[k] / round_s(batch_size, k) for k in (depth, 0)]
    return {
        "batch_size": batch_size,
        "num_draft_tokens_per_round": depth,
        "num_drafts": 100,
        "acceptance_rate_per_pos": RATES[:depth],
        "tokens_per_s": speed[0],
        "verifier_alone_tokens_per_s": speed[1] if alone else None,
    }


def test_the_best_measured_draft_length_of_every_batch_size_is_found_between_measurements():
    sizes = (1, 8, 64)
    by_server = [told(size, depth) for size in sizes for depth in (0, 1, 3, 5)]
    here = [told(size, 5, alone=True) for size in sizes]
    for results in (by_server, here, [*here, *(told(size, depth) for size in sizes for depth in range(1, 5))]):
        found = speeds_of(results)
        assert found.batch_sizes == list(sizes)
        wanted = [[size * GAIN[k] / round_s(size, k) for k in range(6)] for size in sizes]
        np.testing.assert_allclose(found.tokens_per_s, wanted, rtol=1e-12)
        depths = {0, *(one["num_draft_tokens_per_round"] for one in results)}
        best = {size: depth for first, last, depth in found.schedule() for size in range(first, last + 1)}
        assert best == {size: max(depths, key=lambda k: GAIN[k] / round_s(size, k)) for size in range(1, 65)}
        assert len(set(best.values())) >= min(3, len(depths)), "or the search was never put to the test"


def test_a_length_beyond_those_measured_at_a_batch_size_is_not_chosen_there():
    found = speeds_of([told(1, 5, alone=True), told(2, 2, alone=True)])
    assert np.isnan(found.tokens_per_s[1]).tolist() == [False, False, False, True, True, True]
    assert found.schedule()[-1] == (2, 2, 2)


def test_a_length_that_looks_faster_between_measurements_is_named_and_not_chosen(tmp_path, capsys):
    def run(name: str, accepted: list[int], depth: int) -> None:
        records = [question_record(accepted, name=f"q/{i}", server=True) for i in range(4)]
        evaluation(
            tmp_path / "runs" / name,
            records,
            num_draft_tokens=depth,
            engine=EvaluateEngine.server,
            endpoint="http://h/v1",
        )

    for name, accepted, depth in (("alone", [], 0), ("two", [2, 2, 2], 2)):
        run(name, accepted, depth)
    head = tmp_path / "head"
    head.mkdir()
    (head / "trtllm.yaml").write_text("speculative_config: {eagle3_layers_to_capture: [1, 2]}\n")
    tune(Config("tune", str(tmp_path / "runs"), tune=TuneConfig(["alone", "two"], head=str(head))))
    printed = capsys.readouterr().out
    assert "eagle3_layers_to_capture:" in printed, "an export of other aux layers would lose acceptance"
    assert "above 1 were not measured, and get what 1 has" in printed
    found = speeds_of([told(1, 0), {**told(1, 5), "tokens_per_s": 1.1 * told(1, 0)["tokens_per_s"]}])
    assert np.nanargmax(found.tokens_per_s[0]) not in (0, 5)
    assert found.schedule() == [(1, 1, 5)]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([told(1, 0), told(1, 3), told(4, 3)], "evaluate.batch_size=4 the verifier was measured with the head only"),
        ([told(1, 0)], "evaluate.batch_size=1 the verifier was measured alone only"),
    ],
)
def test_a_batch_size_without_one_of_both_is_refused(results, words):
    with pytest.raises(ValueError, match=words):
        speeds_of(results)


def test_engines_are_told_in_their_own_terms():
    files = settings([(1, 4, 3), (5, 8, 1), (9, 16, 0)], "a/head")
    vllm = json.loads(files["vllm.json"])
    assert vllm["num_speculative_tokens"] == 3
    assert vllm["num_speculative_tokens_per_batch_size"] == [[1, 4, 3], [5, 8, 1], [9, 16, 0]]
    slots = {int(size): entry["candidate_steps"] for size, entry in json.loads(files["sglang.json"]).items()}
    nearest = [slots[min(slots, key=lambda slot: abs(slot - size))] for size in range(1, 17)]
    assert nearest == [[3]] * 4 + [[1]] * 4 + [[0]] * 8
    assert OmegaConf.create(files["tensorrt_llm.yaml"]).speculative_config.draft_len_schedule == {4: 3, 8: 1, 16: 0}
    assert settings([(1, 8, 0)], "a/head") == {}
    rising = OmegaConf.create(settings([(1, 2, 0), (3, 8, 3)], "a/head")["tensorrt_llm.yaml"]).speculative_config
    assert (rising.max_draft_len, dict(rising.draft_len_schedule)) == (3, {2: 3, 8: 3, 65536: 3})


def test_evaluations_of_a_server_with_and_without_the_head_become_settings(tmp_path, capsys):
    by_server = {"engine": EvaluateEngine.server, "endpoint": "http://h/v1", "batch_size": 2}
    alone = [question_record([], name=f"q/{i}", server=True) for i in range(4)]
    records = [question_record([3, 2, 3], name=f"q/{i}", server=True) for i in range(4)]
    evaluation(tmp_path / "runs" / "alone", alone, num_draft_tokens=0, **by_server)
    evaluation(tmp_path / "runs" / "head", records, **by_server)
    config = Config("tune", str(tmp_path / "runs"), tune=TuneConfig(["alone", "head"], folder=str(tmp_path / "out")))
    tune(config)
    printed = capsys.readouterr().out
    assert "| batch size | alone |" in printed
    assert "Batch sizes 1 to 1 were not measured, and get what 2 has." in printed
    assert "head has 4 questions at evaluate.batch_size=2" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sglang.json",
        "tensorrt_llm.yaml",
        "vllm.json",
    ]


def test_evaluations_that_are_not_alike_are_refused(tmp_path):
    records = [question_record([3, 2, 3], name=f"q/{i}") for i in range(4)]
    evaluation(tmp_path / "runs" / "one", records)
    evaluation(tmp_path / "runs" / "two", records, max_tokens=77)
    evaluation(tmp_path / "runs" / "tree", records, tree_depth=3, num_draft_tokens=8)
    for name in ("head", "other"):
        evaluation(tmp_path / "runs" / name, records)
        manifest = tmp_path / "runs" / name / "evaluation" / "manifest.json"
        written = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**written, "settings": {"head": name}}))
    for runs, words in (
        (["one", "two"], "differ in max_tokens"),
        (["tree"], "tree drafts a tree"),
        (["head", "other"], "head and other are of different heads"),
        ([], "is required"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(Config("tune", str(tmp_path / "runs"), tune=TuneConfig(runs)))
