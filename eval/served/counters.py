"""What servers count of speculation, and how they tell it.

| server | told                                             | rounds                  | accepted tokens by round      |
|--------|--------------------------------------------------|-------------------------|-------------------------------|
| vLLM   | counters at /metrics, over all requests          | `num_drafts`            | sums, and sums by position    |
| vLLM   | with --per-request-spec-decode-metrics: answers' | `num_spec_steps`        | `acceptance_histogram`        |
|        | `metrics.speculative_decoding`                   |                         |                               |
| SGLang | `meta_info` of an answer of /generate            | `spec_verify_ct`        | `spec_correct_drafts_         |
|        |                                                  |                         | histogram`, earlier           |
|        |                                                  |                         | `spec_accept_histogram`       |

Entry n of a histogram says how many rounds accepted n draft tokens, the bonus token not among them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

_VLLM = "vllm:"
_SPECULATION = _VLLM + "spec_decode_num_"
_BY_POSITION = _SPECULATION + "accepted_tokens_per_pos_total"
_SUMS = tuple(f"{_SPECULATION}{name}_total" for name in ("drafts", "draft_tokens", "accepted_tokens"))
_TOKENS, _REQUESTS = _VLLM + "generation_tokens_total", _VLLM + "request_success_total"
_BUSY = (_VLLM + "num_requests_running", _VLLM + "num_requests_waiting")


@dataclass(frozen=True)
class ServedCounts:
    """Sums over rounds, under the names of acceptance.json."""

    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_tokens_per_pos: tuple[int, ...]

    @classmethod
    def of_histogram(cls, histogram: list[int], num_draft_tokens: int, num_positions: int) -> ServedCounts:
        """Sum up how many rounds accepted 0, 1, ... draft tokens."""
        accepted = sum(number * rounds for number, rounds in enumerate(histogram))
        by_position = tuple(sum(histogram[position + 1 :]) for position in range(num_positions))
        return cls(sum(histogram), num_draft_tokens, accepted, by_position)

    def since(self, before: ServedCounts) -> ServedCounts:
        """Return what was added since."""
        by_position = zip(self.num_accepted_tokens_per_pos, before.num_accepted_tokens_per_pos, strict=True)
        return ServedCounts(
            self.num_drafts - before.num_drafts,
            self.num_draft_tokens - before.num_draft_tokens,
            self.num_accepted_tokens - before.num_accepted_tokens,
            tuple(now - then for now, then in by_position),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the sums as a record of questions.jsonl has them."""
        return {**asdict(self), "num_accepted_tokens_per_pos": list(self.num_accepted_tokens_per_pos)}


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


def read_vllm_counters(metrics: str) -> VllmCounters | None:
    """Read vLLM's counters from the Prometheus text of /metrics; None where it does not speculate.

    Raises:
        ValueError: it is no such text.
    """
    sums: Counter[str] = Counter()
    by_position: Counter[int] = Counter()
    seen = set()
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            seen.add(sample.name)
            if sample.name == _BY_POSITION:
                by_position[int(sample.labels["position"])] += int(sample.value)
            elif sample.name in (*_SUMS, _TOKENS, _REQUESTS, *_BUSY):
                sums[sample.name] += int(sample.value)
    if not seen.issuperset((*_SUMS, _BY_POSITION)):
        return None
    if missing := {_TOKENS, _REQUESTS, *_BUSY} - seen:
        raise ValueError(f"its /metrics lack {', '.join(sorted(missing))}")
    positions = tuple(by_position[position] for position in range(len(by_position)))
    drafts, draft_tokens, accepted = (sums[name] for name in _SUMS)
    return VllmCounters(
        speculation=ServedCounts(drafts, draft_tokens, accepted, positions),
        tokens=sums[_TOKENS],
        requests=sums[_REQUESTS],
        busy=sum(sums[name] for name in _BUSY),
    )


def read_vllm_answer(told: dict[str, Any], num_positions: int) -> ServedCounts:
    """Read `metrics.speculative_decoding` of one of vLLM's answers."""
    return ServedCounts.of_histogram(told["acceptance_histogram"], int(told["num_draft_tokens"]), num_positions)


def read_sglang_answer(meta: dict[str, Any], num_draft_tokens: int, num_positions: int) -> ServedCounts:
    """Read the `meta_info` of one of SGLang's answers.

    Args:
        num_draft_tokens: that a round proposes, where the server does not tell how many it proposed.

    Raises:
        ValueError: it tells too little, or what does not fit the answer's length.
    """
    rounds, written = int(meta.get("spec_verify_ct") or 0), int(meta["completion_tokens"])
    if not rounds and written == 1:  # the prompt's own forward gives the first token
        return ServedCounts(0, 0, 0, (0,) * num_positions)
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
