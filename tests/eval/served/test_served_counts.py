"""What vLLM, SGLang and TensorRT-LLM tell of speculation is read as they mean it."""

from pathlib import Path

import pytest
from fledge.eval.served.counters import (
    ServedCounts,
    is_vllms,
    read_sglang_answer,
    read_tensorrt_llm_answer,
    read_vllm_answer,
    read_vllm_counters,
)
from fledge.eval.served.engines import Clock
from sglang_double import meta_info, rounds
from trtllm_double import speculative_decoding

METRICS = Path(__file__).with_name("vllm_metrics.txt").read_text()  # of vLLM 0.32 after some requests, shortened
DRAFTS, BY_POSITION, TOKENS, REQUESTS = 4326, [1775, 1554, 1527], 9126, 191  # as they stand there


def test_vllms_counters_are_read_from_its_own_text():
    counters = read_vllm_counters(METRICS)
    assert is_vllms(METRICS)
    assert counters.speculation == ServedCounts(DRAFTS, 3 * DRAFTS, sum(BY_POSITION), BY_POSITION)
    assert (counters.tokens, counters.requests, counters.busy) == (TOKENS, REQUESTS, 0)


def test_counters_of_several_engines_are_added():
    other = METRICS.replace('engine="0"', 'engine="1"').splitlines()
    both = METRICS + "\n".join(line for line in other if not line.startswith(("#", "process_"))) + "\n"
    one, two = read_vllm_counters(METRICS), read_vllm_counters(both)
    assert two.speculation.since(one.speculation) == one.speculation
    assert (two.tokens, two.requests) == (2 * one.tokens, 2 * one.requests)


def test_requests_that_run_are_seen():
    busy = METRICS.replace('vllm:num_requests_running{engine="0",model_name="tiny"} 0.0', "vllm:num_requests_running 2")
    assert read_vllm_counters(busy).busy == 2


def test_a_vllm_that_does_not_speculate_is_told_from_one_that_lacks_other_counters():
    plain = "\n".join(line for line in METRICS.splitlines() if "spec_decode" not in line) + "\n"
    assert is_vllms(plain)
    assert read_vllm_counters(plain).speculation == ServedCounts(0, 0, 0, [])
    fewer = "\n".join(line for line in METRICS.splitlines() if "request_success" not in line) + "\n"
    with pytest.raises(ValueError, match="lack vllm:request_success_total"):
        read_vllm_counters(fewer)
    assert not is_vllms("# HELP sglang:num_running_reqs x\nsglang:num_running_reqs 0\n")


def test_seconds_are_shared_out_among_requests_in_flight(monkeypatch):
    times = iter([0.0, 10.0, 12.0, 14.0, 18.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    clock = Clock()
    first = clock.change(1)
    second = clock.change(1)
    seconds = [clock.change(-1) - first, clock.change(-1) - second]
    assert seconds == [3.0, 5.0], "two alone and half of two; half of two and four alone"
    third = clock.change(1)
    assert clock.change(-1) - third == 1.0


def test_a_histogram_gives_the_same_sums_as_counters():
    told = {"acceptance_histogram": [4, 2, 0, 1], "num_spec_steps": 7, "num_draft_tokens": 21, "num_spec_tokens": 3}
    assert read_vllm_answer(told, 3) == ServedCounts(7, 21, 5, [3, 1, 1])


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("limit", [1, 2, 9, 24])
def test_sglangs_answers_are_read_under_newer_and_older_names(older, limit):
    taken = rounds(limit)
    by_position = [sum(number > position for number in taken) for position in range(3)]
    expected = ServedCounts(len(taken), 3 * len(taken), sum(taken), by_position)
    assert read_sglang_answer(meta_info([1, 2], limit, older), 3, 3) == expected


def test_a_tree_counts_by_depth():
    meta = {"completion_tokens": 12, "spec_verify_ct": 4, "spec_correct_drafts_histogram": [1, 0, 2, 1]}
    assert read_sglang_answer(meta, 60, 6) == ServedCounts(4, 240, 7, [3, 3, 1, 0, 0, 0])


def test_what_does_not_fit_an_answer_of_sglang_is_refused():
    meta = meta_info([1, 2], 24)
    with_bonus = [0, *meta["spec_accept_histogram"]]
    for wrong in (
        {"spec_correct_drafts_histogram": with_bonus},
        {"spec_verify_ct": 5},
        {"completion_tokens": 40},
        {"completion_tokens": 12},
    ):
        with pytest.raises(ValueError, match="do not fit the answer"):
            read_sglang_answer({**meta, **wrong}, 3, 3)
    with pytest.raises(ValueError, match="without a draft head, or is too old"):
        read_sglang_answer({"completion_tokens": 24, "spec_verify_ct": 0}, 3, 3)


@pytest.mark.parametrize("limit", [1, 2, 9, 24])
def test_tensorrt_llms_answers_are_read(limit):
    taken = rounds(limit)
    by_position = [sum(number > position for number in taken) for position in range(3)]
    expected = ServedCounts(len(taken), 3 * len(taken), sum(taken), by_position)
    assert read_tensorrt_llm_answer(speculative_decoding(limit), limit, 3) == expected


@pytest.mark.parametrize(
    "wrong", [{"num_spec_steps": 5}, {"total_accepted_draft_tokens": 1}, {"acceptance_histogram": [9, 4]}]
)
def test_counts_of_tensorrt_llm_that_contradict_each_other_are_refused(wrong):
    with pytest.raises(ValueError, match="contradict each other"):
        read_tensorrt_llm_answer({**speculative_decoding(24), **wrong}, 24, 3)
