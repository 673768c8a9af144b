"""The tune command: how many draft tokens pay at which load, as settings of the engines.

A round of B sequences with K draft tokens takes t(B, K) seconds and gives B tau(K) tokens; tau(K) is 1 and the rates of
the first K positions. Evaluations tell t at the batch sizes and draft tokens they were made with, 0 for the verifier
alone. In between, t is taken as linear in K, and then in B. Only a K that was measured is chosen: rounds of one number
of tokens may cost more than those of one fewer and one more would tell.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from ...conf.runtime.artifact import read_manifest, write_atomic
from ...conf.schema import Config
from ..compare import find_evaluation, find_run
from ..figures.records import ACCEPTANCE
from ..figures.report import NONE, figure, table

_ALIKE = (
    *("verifier", "engine", "dtype", "questions_digest", "temperature", "top_p", "top_k"),
    *("draft_sampling", "max_tokens"),
)
_FEWEST = 4  # questions of a row: with fewer the last ones are answered with free rows beside them
_BEYOND = 1 << 16  # a batch size that none reaches


@dataclass
class Speeds:
    """How long rounds take, and what they give, by batch size and draft tokens."""

    batch_sizes: list[int]  # that were measured, ascending
    round_s: NDArray[np.float64]  # t [batch sizes, K + 1], from 0 draft tokens on; nan beyond those measured
    measured: NDArray[np.bool_]  # the same shape
    gain: NDArray[np.float64]  # tau [K + 1]

    @property
    def tokens_per_s(self) -> NDArray[np.float64]:
        """Return tokens a second [batch sizes, K + 1]."""
        return np.array(self.batch_sizes)[:, None] * self.gain / self.round_s

    def best(self, tokens_per_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Return of each row [n, K + 1] the draft tokens that are fastest, among those that were measured anywhere."""
        return np.nanargmax(np.where(self.measured.any(0), tokens_per_s, np.nan), 1)

    def schedule(self) -> list[tuple[int, int, int]]:
        """Return (first batch size, last, draft tokens), from 1 to the largest that was measured."""
        batches = np.arange(1, self.batch_sizes[-1] + 1)
        between = np.stack([np.interp(batches, self.batch_sizes, seconds) for seconds in self.round_s.T], 1)
        best = self.best(self.gain / between)
        edges = [0, *(np.flatnonzero(np.diff(best)) + 1), len(best)]
        return [(int(first) + 1, int(end), int(best[first])) for first, end in pairwise(edges)]


def tune(config: Config) -> None:
    """Print what the evaluations of `tune.runs` say of each batch size, and settings; write them to `tune.folder`."""
    options = config.tune
    if not options.runs:
        raise ValueError(
            "tune.runs is required: fledge tune RUN..., evaluations of one head at several evaluate.batch_size, and of "
            "the verifier alone (evaluate.num_draft_tokens=0) if a server answered"
        )
    found = {run: find_evaluation(find_run(run, config.runs_dir, "tune.runs")) for run in options.runs}
    if lacking := [run for run, folder in found.items() if folder is None]:
        raise ValueError(f"tune.runs: {lacking[0]} has no evaluation: run `fledge evaluate` first")
    results = {run: json.loads((folder / ACCEPTANCE).read_text()) for run, folder in found.items() if folder}
    _check_alike(results)
    manifests = {run: read_manifest(folder, "evaluation") for run, folder in found.items() if folder}
    heads = {head: run for run, one in manifests.items() if (head := one["settings"].get("head"))}  # a server hides its
    if len(heads) > 1:
        raise ValueError(f"tune.runs: {' and '.join(heads.values())} are of different heads: tune one at a time")
    speeds = speeds_of(list(results.values()))
    schedule = speeds.schedule()
    print(_table(speeds), "", _words(schedule), *_cautions(results, speeds), sep="\n")
    files = settings(schedule, options.head)
    for text in files.values():
        print(f"\n{text}", end="")
    if files and options.folder:
        folder = Path(options.folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomic(folder / name, text)
        print(f"\nwritten to {options.folder}: {', '.join(files)}")


def _check_alike(results: dict[str, dict[str, Any]]) -> None:
    first, *others = results
    for run, one in results.items():
        if one["drafting"] != "chain":
            raise ValueError(f"tune.runs: {run} drafts a tree: engines choose the length of chains by load")
        if one["tokens_per_s"] is None:
            raise ValueError(f"tune.runs: {run} tells no tokens_per_s: evaluate it again under another name")
    for run in others:
        for name in _ALIKE:
            ours, theirs = results[run].get(name), results[first].get(name)
            if ours != theirs:
                raise ValueError(f"tune.runs: {run} and {first} differ in {name} ({ours}, {theirs}): evaluate alike")


def speeds_of(results: list[dict[str, Any]]) -> Speeds:
    """Return the speeds that evaluations tell, and those between.

    Acceptance is that of the evaluation with the most draft tokens, the one of most rounds if there are several.
    """
    longest = max(results, key=lambda one: (one["num_draft_tokens_per_round"], one["num_drafts"]))
    gain = 1 + np.cumsum([0.0, *longest["acceptance_rate_per_pos"]])
    points: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for one in results:
        points[one["batch_size"]][one["num_draft_tokens_per_round"]].append(one["tokens_per_s"])
        if one["verifier_alone_tokens_per_s"] is not None:
            points[one["batch_size"]][0].append(one["verifier_alone_tokens_per_s"])
    depths = np.arange(len(gain))
    round_s, measured = [], []
    for batch_size, by_depth in sorted(points.items()):
        known = sorted(by_depth)
        if known[0] or len(known) < 2:
            have, lack = ("with the head", "alone: 0") if known[0] else ("alone", "with the head: 3, say")
            raise ValueError(
                f"tune.runs: at evaluate.batch_size={batch_size} the verifier was measured {have} only: evaluate it "
                f"{lack} as evaluate.num_draft_tokens"
            )
        seconds = [batch_size * gain[depth] / np.mean(by_depth[depth]) for depth in known]
        round_s.append(np.interp(depths, known, seconds, right=np.nan))
        measured.append(np.isin(depths, known))
    return Speeds(sorted(points), np.array(round_s), np.array(measured), gain)


def _table(speeds: Speeds) -> str:
    depths = range(len(speeds.gain))
    head = ["batch size", "alone", *(f"{depth} draft tokens" for depth in depths[1:]), "best", "speed-up"]
    rows, every = [], speeds.tokens_per_s
    for batch_size, tokens_per_s, measured, best in zip(
        speeds.batch_sizes, every, speeds.measured, speeds.best(every), strict=True
    ):
        cells = [
            NONE if np.isnan(value) else ("" if known else "~") + figure(float(value), 0)
            for value, known in zip(tokens_per_s, measured, strict=True)
        ]
        rows.append([str(batch_size), *cells, str(best), figure(float(tokens_per_s[best] / tokens_per_s[0]), unit="x")])
    return f"{table(head, rows)}\n\nTokens a second; ~ is between measurements."


def _words(schedule: list[tuple[int, int, int]]) -> str:
    if not any(depth for *_, depth in schedule):
        return "Draft tokens pay at no batch size that was measured: serve the verifier without the head."
    parts = (f"{depth} at batch sizes {first} to {last}" for first, last, depth in schedule)
    return f"Draft tokens: {', '.join(parts)}."


def _cautions(results: dict[str, dict[str, Any]], speeds: Speeds) -> Iterator[str]:
    """Yield what the measurements do not tell."""
    if (least := speeds.batch_sizes[0]) > 1:
        yield f"Batch sizes 1 to {least - 1} were not measured, and get what {least} has."
    if speeds.schedule()[-1][2]:
        largest = speeds.batch_sizes[-1]
        yield f"Batch sizes above {largest} were not measured, and get what {largest} has: measure your full load."
    for batch_size, tokens_per_s in zip(speeds.batch_sizes, speeds.tokens_per_s, strict=True):
        if not speeds.measured[:, fastest := int(np.nanargmax(tokens_per_s))].any():
            yield f"At batch size {batch_size} {fastest} draft tokens may be faster still, but were not measured."
    for run, one in results.items():
        if one["num_questions"] < _FEWEST * one["batch_size"]:
            yield (
                f"{run} has {one['num_questions']} questions at evaluate.batch_size={one['batch_size']}, so that on "
                f"average fewer were asked at a time: {_FEWEST} times as many questions tell more."
            )


def settings(schedule: list[tuple[int, int, int]], head: str) -> dict[str, str]:
    """Return what each engine reads, by file name; nothing if no draft token pays."""
    most = max(depth for _, _, depth in schedule)
    if not most:
        return {}
    vllm = {
        "method": "eagle3",
        "model": head,
        "num_speculative_tokens": most,
        "num_speculative_tokens_per_batch_size": [list(part) for part in schedule],
    }
    # SGLang takes the entry of the nearest batch size: both ends of each range are named.
    sglang = {str(end): {"candidate_steps": [depth]} for first, last, depth in schedule for end in (first, last)}
    # TensorRT-LLM wants max_draft_len for the smallest batches, and drafts nothing beyond the last entry.
    by_last = {last: depth for _, last, depth in schedule}
    first, last = schedule[0][1], schedule[-1][2]
    written = Path(head, "trtllm.yaml")  # by an export; it names the aux layers
    tensorrt_llm = {
        **(OmegaConf.select(OmegaConf.load(written), "speculative_config") if written.is_file() else {}),
        "decoding_type": "Eagle3",
        "max_draft_len": most,
        "speculative_model": head,
        "draft_len_schedule": by_last | {first: most} | ({_BEYOND: last} if last else {}),
    }
    return {
        "vllm.json": json.dumps(vllm) + "\n",
        "sglang.json": json.dumps(sglang) + "\n",
        "tensorrt_llm.yaml": OmegaConf.to_yaml({"speculative_config": tensorrt_llm}),
    }
