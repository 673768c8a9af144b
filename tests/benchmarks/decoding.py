"""Measure speculative decoding of a random model: `python tests/benchmarks/decoding.py [option=value ...]`.

Prints one JSON line. Needs torch and transformers only. What a random head proposes is never accepted, and a round
costs the same whatever is: `tokens_per_s` is of rounds that gain `acceptance_length` tokens each. Parts of a round are
told by CPU seconds, by timers around them in a run of its own, or on a GPU by the time of the forward alone.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tokenizers
import torch
from benchmark_options import parse_options
from fledge.conf.schema import DraftConfig, DraftSampling
from fledge.eval.decoding.acceptance import AcceptanceRule
from fledge.eval.decoding.graphs import Graphs
from fledge.eval.decoding.head_drafter import DraftDecoder
from fledge.eval.decoding.prompt_lookup import NoDraft
from fledge.eval.decoding.proposal import Drafter
from fledge.eval.decoding.speculator import Request, Speculator
from fledge.models.head.config import DraftHeadConfig
from fledge.models.head.draft_head import DraftHead, initialise
from fledge.models.head.vocabulary import build_vocabulary
from fledge.models.kernels import DECODING
from fledge.models.verifier.cache import round_up
from fledge.models.verifier.config import default_aux_layers
from fledge.models.verifier.model import Verifier
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass
class Options:
    """What is measured. `preset` sets the sizes; options that follow it change them."""

    hidden_size: int = 192
    intermediate_size: int = 384
    num_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 1600
    draft_vocab_size: int = 1024
    num_draft_tokens: int = 3
    tree_depth: int = 0  # 0: a chain
    tree_top_k: int = 8
    batch_size: int = 1
    temperature: float = 0.0
    draft_sampling: str = "greedy"
    acceptance_length: float = 3.0  # that tokens_per_s is reckoned with
    prompt_tokens: int = 64
    rounds: int = 100
    kernels: bool = True  # on a GPU
    cuda_graphs: bool = True  # on a GPU
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0  # of the CPU; 0: torch's default
    profile: bool = False  # print torch's profile of the rounds to standard error
    seed: int = 0


PRESETS: dict[str, dict[str, Any]] = {
    "demo": {},
    "llama8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "draft_vocab_size": 32000,
        "dtype": "bfloat16",
        "device": "cuda",
    },
}
CHOICES = {
    "draft_sampling": [kind.value for kind in DraftSampling],
    "dtype": ["float32", "bfloat16", "float16"],
    "device": ["cpu", "cuda"],
}


def parse(arguments: list[str]) -> Options:
    """Read `name=value` arguments, in order."""
    return parse_options(arguments, Options(), PRESETS, CHOICES)


def make_models(options: Options) -> tuple[Verifier, DraftHead]:
    """Draw a Llama, whose answers never end, and a head."""
    torch.manual_seed(options.seed)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    config = LlamaConfig(
        hidden_size=options.hidden_size,
        intermediate_size=options.intermediate_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_attention_heads,
        num_key_value_heads=options.num_key_value_heads,
        head_dim=options.head_dim,
        vocab_size=options.vocab_size,
        max_position_embeddings=options.prompt_tokens + 8 * options.rounds + 1024,
        bos_token_id=None,
        eos_token_id=None,
        dtype=dtype,
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()))
    with device:
        model: Any = LlamaForCausalLM(config)
    model.to(device, dtype)
    verifier = Verifier(model, tokenizer, default_aux_layers(options.num_layers))
    draft = DraftConfig(vocab_size=options.draft_vocab_size, aux_layers=verifier.aux_layers)
    vocabulary = build_vocabulary(torch.arange(options.vocab_size, 0, -1), options.draft_vocab_size)
    head = DraftHead(DraftHeadConfig.from_verifier(draft, config), vocabulary)
    initialise(head, model.model.embed_tokens.weight.cpu(), model.lm_head.weight.cpu(), options.seed)
    return verifier, head.to(device, dtype)


class Bench:
    """A speculator with a random verifier and a random head, and prompts that it has read."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._device = torch.device(options.device)
        self.verifier, self.head = make_models(options)
        sampling = DraftSampling(options.draft_sampling)
        kernels = DECODING if options.kernels else frozenset()
        rule = AcceptanceRule(options.temperature, draft_sampling=sampling, kernels=kernels)
        shape = options.num_draft_tokens, options.tree_depth or None, options.tree_top_k
        embedding = self.verifier.model.get_input_embeddings().weight
        self.drafter = DraftDecoder(self.head, embedding, *shape, rule, options.batch_size)
        self.speculator = Speculator(self.verifier, [self.drafter], rule, options.batch_size, options.cuda_graphs)
        generator = torch.Generator().manual_seed(options.seed)
        prompts = torch.randint(options.vocab_size, (options.batch_size, options.prompt_tokens), generator=generator)
        limit = 2 * options.rounds
        self.speculator.prefill([Request(prompt, limit, str(n)) for n, prompt in enumerate(prompts.tolist())])

    def run(self, drafter: Drafter, rounds: int) -> tuple[int, float]:
        """Answer for about so many rounds; give how many there were, and their wall seconds."""
        answers = self.speculator.decode(drafter, rounds + 1)
        return max(len(answer.drafted) for answer in answers), sum(answer.seconds for answer in answers)

    def seconds(self, drafter: Drafter) -> dict[str, float]:
        """Give CPU and wall seconds of a round, but for the first ones."""
        self.run(drafter, self._options.rounds)  # and captures a graph for every length
        with timers([(self.speculator, "_run_round", "round")]) as found:
            rounds, wall = self.run(drafter, self._options.rounds)
        return {"cpu_s": found["round"] / rounds, "wall_s": wall / rounds}

    def parts(self) -> dict[str, float]:
        """Give the CPU seconds that a round spends in the verifier, in drafting, in the head and in its linear maps."""
        timed = [(self.speculator, "_run_round", "round"), (self.verifier, "forward", "verifier")]
        timed += [(self.drafter, "propose", "propose"), (self.drafter, "extend", "extend")]
        timed += [(self.head, "fuse", "head"), (self.head, "step", "head"), (self.head.lm_head, "forward", "head")]
        timed += [(m, "forward", "head_linear") for m in self.head.modules() if isinstance(m, nn.Linear)]
        with timers(timed) as found:
            rounds, _ = self.run(self.drafter, self._options.rounds)
        return {name: seconds / rounds for name, seconds in found.items()}

    def verifier_seconds(self) -> float:
        """Give the wall seconds of the verifier's forward by itself, captured where rounds are."""
        cached = self.speculator.cached
        lengths = torch.full((self._options.batch_size,), self._options.prompt_tokens, device=self._device)
        fed = torch.zeros(len(lengths), self.drafter.num_draft_tokens + 1, dtype=torch.int64, device=self._device)
        num_read = round_up(self._options.prompt_tokens + self._options.rounds)
        run: Callable[[], Tensor] = lambda: cached.forward(fed, lengths, num_read).logits  # noqa: E731
        graphs = Graphs(self._device) if self._options.cuda_graphs else None
        started = 0.0
        for number in range(self._options.rounds + 5):
            if number == 5:
                torch.cuda.synchronize(self._device)
                started = time.perf_counter()
            _ = run() if graphs is None else graphs.run(0, run)
        torch.cuda.synchronize(self._device)
        return (time.perf_counter() - started) / self._options.rounds

    def waits(self) -> float:
        """Give how often a round waits for the GPU, as torch tells."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                rounds, _ = self.run(self.drafter, self._options.rounds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in told) / rounds


@contextmanager
def timers(methods: list[tuple[Any, str, str]]) -> Iterator[dict[str, float]]:
    """Add up the CPU seconds of (object, method, name) while inside."""
    found = dict.fromkeys((name for _, _, name in methods), 0.0)

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*arguments: Any, **keywords: Any) -> Any:
            started = time.process_time()
            result = function(*arguments, **keywords)
            found[name] += time.process_time() - started
            return result

        return run

    for instance, method, name in methods:
        setattr(instance, method, timed(getattr(instance, method), name))
    try:
        yield found
    finally:
        for instance, method, _ in methods:
            vars(instance).pop(method, None)


def measure(options: Options) -> dict[str, Any]:
    """Measure a round, and a token of the verifier alone."""
    bench = Bench(options)
    speculative, alone = bench.seconds(bench.drafter), bench.seconds(NoDraft())
    clock = "cpu_s" if options.device == "cpu" else "wall_s"
    gained = options.batch_size * options.acceptance_length
    result: dict[str, Any] = {
        "round": speculative,
        "alone": alone,
        "tokens_per_s": gained / speculative[clock],
        "tokens_per_s_alone": options.batch_size / alone[clock],
        "acceptance_length_to_break_even": speculative[clock] / alone[clock],
    }
    if options.device == "cpu":
        parts = bench.parts()
        result["parts_cpu_s"] = parts
        result["share_outside_verifier"] = 1 - parts["verifier"] / parts["round"]
        for name in ("head", "head_linear"):
            result[f"share_outside_verifier_and_{name}"] = 1 - (parts["verifier"] + parts[name]) / parts["round"]
    else:
        result["verifier_wall_s"] = bench.verifier_seconds()
        result["share_outside_verifier"] = 1 - result["verifier_wall_s"] / speculative["wall_s"]
        result["waits_per_round"] = bench.waits()
    if options.profile:
        with torch.profiler.profile() as profile:
            bench.run(bench.drafter, options.rounds)
        order = f"self_{options.device}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=30), file=sys.stderr)
    return result


def main(arguments: list[str]) -> None:
    """Measure and print one JSON line."""
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and this machine has no GPU that torch can use: set it to cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    print(json.dumps({**_rounded(measure(options)), "options": dataclasses.asdict(options)}))


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {k: _rounded(v) if isinstance(v, dict) else float(f"{v:.4g}") for k, v in values.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
