"""Measure answers of a verifier in this process: `python tests/benchmarks/generation.py verifier=FOLDER prompts=FILE`.

Greedy answers by `Generation` (as `fledge synthesize`), by transformers in padded batches of as many (as fledge did
before), by transformers' own continuous batching, and by the verifier alone in `fledge evaluate`. Prints one JSON line:
tokens/s, CPU seconds, and how many answers equal those of the first.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark_options import parse_options
from fledge.conf.schema import Dtype, VerifierConfig
from fledge.data_synthesis.answers.generation import Generation, GenerationRequest, Task
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.speculator import Request, Speculator
from fledge.models.verifier.model import Verifier
from transformers import GenerationConfig


@dataclass
class Options:
    """What is measured."""

    verifier: str = "embedded"
    dtype: str = "float32"
    prompts: str = ""  # a JSONL file of prompts with `turns`
    number: int = 128
    rows: int = 64
    max_tokens: int = 256
    threads: int = 2
    ways: str = "padded,continuous,transformers,evaluation"  # that are measured


def padded(verifier: Verifier, contexts: list[list[int]], options: Options) -> list[list[int]]:
    """Generate in batches of similar length, each as wide and as long as the longest in it."""
    answers: dict[int, list[int]] = {}
    order = sorted(range(len(contexts)), key=lambda number: len(contexts[number]))
    for start in range(0, len(order), options.rows):
        batch = order[start : start + options.rows]
        width, end = max(len(contexts[n]) for n in batch), verifier.end_token_ids
        rows = [contexts[n] for n in batch]
        output = verifier.model.generate(
            input_ids=torch.tensor([[end[0]] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            generation_config=GenerationConfig(
                max_new_tokens=options.max_tokens, do_sample=False, eos_token_id=end, pad_token_id=end[0]
            ),
        )
        for number, row in zip(batch, output[:, width:].tolist(), strict=True):
            stop = next((place for place, token in enumerate(row) if token in end), len(row) - 1)
            answers[number] = row[: stop + 1]
    return [answers[number] for number in range(len(contexts))]


def continuous(verifier: Verifier, contexts: list[list[int]], options: Options) -> list[list[int]]:
    """Generate as `fledge synthesize` does."""
    answers: dict[int, list[int]] = {}

    def task(number: int) -> Task:
        request = GenerationRequest(contexts[number], options.max_tokens, verifier.end_token_ids)
        answers[number] = (yield request).tokens

    order = sorted(range(len(contexts)), key=lambda number: len(contexts[number]))
    Generation(verifier, min(options.rows, len(order))).run(task(number) for number in order)
    return [answers[number] for number in range(len(contexts))]


def transformers(verifier: Verifier, contexts: list[list[int]], options: Options) -> list[list[int]]:
    """Generate by transformers' continuous batching."""
    config = GenerationConfig(
        max_new_tokens=options.max_tokens,
        do_sample=False,
        eos_token_id=verifier.end_token_ids,
        pad_token_id=verifier.end_token_ids[0],
    )
    outputs = verifier.model.generate_batch(inputs=contexts, generation_config=config, progress_bar=False)
    return [list(outputs[name].generated_tokens) for name in sorted(outputs, key=lambda n: int(n.rpartition("_")[2]))]


def evaluation(verifier: Verifier, contexts: list[list[int]], options: Options) -> list[list[int]]:
    """Generate as `fledge evaluate` does with the verifier alone."""
    speculator, answers = Speculator(verifier, [NoDraft()], num_sequences=options.rows), list[list[int]]()
    for start in range(0, len(contexts), options.rows):
        group = contexts[start : start + options.rows]
        speculator.prefill([Request(context, options.max_tokens) for context in group])
        answers += [answer.tokens for answer in speculator.decode(NoDraft())]
    return answers


WAYS: dict[str, Callable[[Verifier, list[list[int]], Options], list[list[int]]]] = {
    "padded": padded,
    "continuous": continuous,
    "transformers": transformers,
    "evaluation": evaluation,
}


def measure(options: Options) -> dict[str, Any]:
    """Return what is printed."""
    torch.set_num_threads(options.threads)
    config = VerifierConfig(path=options.verifier, dtype=Dtype(options.dtype))
    lines = Path(options.prompts).read_text().splitlines()[: options.number]
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]
    result: dict[str, Any] = asdict(options)
    first: list[list[int]] = []
    for name in options.ways.split(","):
        verifier = Verifier.load(config)
        contexts = [prompt_tokens(verifier.tokenizer, chat) for chat in chats]
        WAYS[name](verifier, contexts[:2], options)
        wall, cpu = time.perf_counter(), time.process_time()
        answers = WAYS[name](verifier, contexts, options)
        seconds, tokens = time.perf_counter() - wall, sum(map(len, answers))
        first = first or answers
        result[name] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "cpu_s": round(time.process_time() - cpu, 1),
            "tokens": tokens,
            "equal_answers": sum(a == b for a, b in zip(first, answers, strict=True)),
        }
        print(name, result[name], file=sys.stderr, flush=True)
    return result


if __name__ == "__main__":
    print(json.dumps(measure(parse_options(sys.argv[1:], Options()))))
