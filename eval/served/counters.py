"""What servers count of speculation, and how they tell it.

vLLM tells sums over all requests at /metrics, and with --per-request-spec-decode-metrics those of an answer in its
`metrics.speculative_decoding`; SGLang tells those of an answer in the `meta_info` of /generate; TensorRT-LLM in the
`speculative_decoding` of a choice, with per_request_spec_decode_stats. An answer has a histogram: entry n says how many
rounds accepted n draft tokens, the bonus token not among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_VLLM = "vllm:"
_SUMS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
_OF_VLLM = {name: f"{_VLLM}spec_decode_{name}_total" for name in (*_SUMS, "num_accepted_tokens_per_pos")}
_TOKENS, _REQUESTS = _VLLM + "generation_tokens_total", _VLLM + "request_success_total"
_BUSY = (_VLLM + "num_requests_running", _VLLM + "num_requests_waiting")


@dataclass(frozen=True)
class ServedCounts:
    """Sums over rounds, under the names of acceptance.json."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: list[int]

    @classmethod
    def of_histogram(cls, histogram: list[int], num_draft_tokens: int, num_positions: int) -> ServedCounts:
        """Sum up how many rounds accepted 0, 1, ... draft tokens."""
        accepted = sum(number * rounds for number, rounds in enumerate(histogram))
        by_position = [sum(histogram[position + 1 :]) for position in range(num_positions)]
        return cls(sum(histogram), num_draft_tokens, accepted, by_position)

    def since(self, before: ServedCounts) -> ServedCounts:
        """Return what was added since."""
        by_position = zip(self.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, strict=True)
        sums: dict[str, Any] = {name: getattr(self, name) - getattr(before, name) for name in _SUMS}
        return ServedCounts(**sums, num_accepted_tokens_per_pos=[now - then for now, then in by_position])


@dataclass(frozen=True)
class VllmCounters:
    """vLLM's counters at one moment, over all its engines and models."""

    speculation: ServedCounts
    tokens: int  # written, of all requests
    requests: int  # ended, however they did
    busy: int  # requests running or waiting


def is_vllms(metrics: str) -> bool:
    """Return whether a text of metrics is vLLM's."""
    return any(line.startswith(_VLLM) for line in metrics.splitlines())


def read_vllm_counters(metrics: str) -> VllmCounters:
    """Read vLLM's counters from the Prometheus text of /metrics; no positions if it does not speculate."""
    sums: Counter[str] = Counter()
    by_position: Counter[int] = Counter()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name in (*_OF_VLLM.values(), _TOKENS, _REQUESTS, *_BUSY):
                sums[sample.name] += int(sample.value)
            if sample.name == _OF_VLLM["num_accepted_tokens_per_pos"]:
                by_position[int(sample.labels["position"])] += int(sample.value)
    if missing := {_TOKENS, _REQUESTS, *_BUSY} - sums.keys():
        raise ValueError(f"its /metrics lack {', '.join(sorted(missing))}")
    positions = [by_position[position] for position in range(len(by_position))]
    drafts, draft_tokens, accepted = (sums[_OF_VLLM[name]] for name in _SUMS)
    speculation = ServedCounts(drafts, draft_tokens, accepted, positions)
    return VllmCounters(speculation, sums[_TOKENS], sums[_REQUESTS], sum(sums[name] for name in _BUSY))


def read_vllm_answer(told: dict[str, Any] | None, num_positions: int) -> ServedCounts:
    """Read `metrics.speculative_decoding` of one of vLLM's answers; there is none without a head."""
    told = told or {"acceptance_histogram": [], "num_draft_tokens": 0}
    return ServedCounts.of_histogram(told["acceptance_histogram"], int(told["num_draft_tokens"]), num_positions)


def read_sglang_answer(meta: dict[str, Any], num_draft_tokens: int, num_positions: int) -> ServedCounts:
    """Read the `meta_info` of one of SGLang's answers; a round proposes `num_draft_tokens` if it does not tell.

    ValueError: it tells too little, or what does not fit the answer's length.
    """
    rounds, written = int(meta.get("spec_verify_ct") or 0), int(meta["completion_tokens"])
    if not rounds and (written == 1 or not num_draft_tokens):  # the prompt's own forward gives the first token
        return ServedCounts(0, 0, 0, [0] * num_positions)
    # The second is the older name.
    histogram = meta.get("spec_correct_drafts_histogram") or meta.get("spec_accept_histogram")
    if not rounds or not histogram:
        raise ValueError(
            "its answers do not tell spec_verify_ct and spec_correct_drafts_histogram: it runs without a draft head, "
            "or is too old"
        )
    proposed = int(meta.get("spec_num_proposed_drafts") or rounds * num_draft_tokens)
    counts = ServedCounts.of_histogram(histogram, proposed, num_positions)
    gained = 1 + counts.num_accepted_tokens + counts.num_drafts  # the last round may end beyond the answer
    if counts.num_drafts != rounds or len(histogram) > num_positions + 1 or not 0 <= gained - written <= num_positions:
        raise ValueError(
            f"its counts do not fit the answer: spec_verify_ct {rounds}, histogram {histogram}, {written} tokens, "
            f"{num_positions} draft tokens that a round can accept"
        )
    return counts


def read_tensorrt_llm_answer(told: dict[str, Any] | None, written: int, num_draft_tokens: int) -> ServedCounts:
    """Read the `speculative_decoding` of one of TensorRT-LLM's choices; none of one token, or without a head.

    ValueError: it tells nothing, or drafts otherwise, or its counts contradict each other.
    """
    if told is None and (written <= 1 or not num_draft_tokens):
        return ServedCounts(0, 0, 0, [0] * num_draft_tokens)
    if told is None:
        raise ValueError(
            "its answers do not tell speculative_decoding: set per_request_spec_decode_stats: true in the file of "
            "--extra_llm_api_options, with the head and the PyTorch backend, in a release that has the field"
        )
    histogram, drafted = told["acceptance_histogram"], told["num_spec_tokens"]
    if drafted != num_draft_tokens:
        raise ValueError(
            f"it drafts {drafted or 'a varying number of'} tokens a round, and evaluate.num_draft_tokens is "
            f"{num_draft_tokens}: set it to max_draft_len, without a draft_len_schedule"
        )
    counts = ServedCounts.of_histogram(histogram, int(told["total_draft_tokens"]), num_draft_tokens)
    sums = counts.num_drafts, counts.num_accepted_tokens
    if len(histogram) != drafted + 1 or sums != (told["num_spec_steps"], told["total_accepted_draft_tokens"]):
        raise ValueError(f"its counts contradict each other: {told}")
    return counts
