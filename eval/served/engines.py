"""Serving engines as evaluation sees them: one answer to a prompt of tokens, and what speculation did for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...conf.schema import Config, EvaluateConfig, VerifierConfig
from ...data_synthesis.answers.endpoint import Endpoint, RequestError
from ...data_synthesis.answers.verify_endpoint import find_model
from ...data_synthesis.tokens.chat_template import answer_text, prompt_tokens
from ...models.verifier.config import load_config, load_end_token_ids, load_tokenizer
from ..figures.results import DEFINITION
from .counters import (
    ServedCounts,
    VllmCounters,
    is_vllms,
    read_sglang_answer,
    read_tensorrt_llm_answer,
    read_vllm_answer,
    read_vllm_counters,
)

_POLL_S, _LAG_S, _QUIET_S = 0.01, 20.0, 60.0
_NO_VERSION = "(version not told)"


@dataclass(frozen=True)
class Completion:
    """An answer, and what speculation did for it."""

    text: str
    output_tokens: int  # end-of-turn included
    seconds: float  # its share of the time that it took, the prompt included
    counts: ServedCounts


class Clock:
    """Shares seconds out among the requests in flight, as decoding in this process does among the rows of a batch."""

    def __init__(self) -> None:
        self._in_flight, self._shared, self._at = 0, 0.0, time.perf_counter()

    def change(self, by: int) -> float:
        """Change how many requests are in flight; return the seconds that one in flight all along has had."""
        now = time.perf_counter()
        self._shared += (now - self._at) / max(1, self._in_flight)
        self._at, self._in_flight = now, self._in_flight + by
        return self._shared


class _Engine:
    """A server of the verifier, drafting as the options say, or alone with 0 draft tokens; `name` has its version."""

    def __init__(self, verifier: VerifierConfig, options: EvaluateConfig, endpoint: Endpoint, name: str) -> None:
        self.name = name
        self._options, self._endpoint, self._root = options, endpoint, _root(endpoint)
        self._clock = Clock()
        self.tokenizer = load_tokenizer(verifier)
        # Fields of a request that all engines know, with whatever would make greedy less than greedy.
        self._sampling: dict[str, Any] = {"temperature": options.temperature, "top_p": options.top_p}
        self._sampling |= {"top_k": options.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
        self._sampling |= {"stop_token_ids": load_end_token_ids(verifier, self.tokenizer)}

    def _text(self, tokens: list[int] | None, text: str | None = None) -> str:
        return answer_text(self.tokenizer, tokens, text, self._sampling["stop_token_ids"])

    async def _post(
        self, path: str, body: dict[str, Any], prompt: list[int], read: Callable[[Any], tuple[Any, ...]]
    ) -> tuple[Any, ...]:
        """Send a request; return its seconds, and what `read` returns of its answer after the number of tokens read."""
        began = self._clock.change(1)
        try:
            response = await self._endpoint.send("POST", path, body)
        finally:
            seconds = self._clock.change(-1) - began
        try:
            num_read, *values = read(response)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"an answer without {error}" if isinstance(error, KeyError) else f"no completion ({error!r})"
            raise ValueError(
                f"{self._endpoint.url} gave {what}; evaluation needs a completion and its counts: {str(response)[:200]}"
            ) from None
        if num_read != len(prompt):
            raise ValueError(f"{self._endpoint.url} read {num_read} tokens of a prompt of {len(prompt)}")
        return seconds, *values


async def open_engine(config: Config, endpoint: Endpoint) -> ServingEngine:
    """Find out what serves at an endpoint; check that it is the verifier, and speculates as is to be measured."""
    verifier, options, url = config.verifier, config.evaluate, endpoint.url
    positions = load_config(verifier).max_position_embeddings
    await find_model(endpoint, config.synthesize.model, verifier, positions)
    metrics = await _look(endpoint, "/metrics")
    engine: ServingEngine
    if isinstance(metrics, str) and is_vllms(metrics):
        engine = Vllm(verifier, options, endpoint, f"vllm {await _version(endpoint)}")
    elif isinstance(metrics, list) or "tensorrt_llm" in [model.get("owned_by") for model in await endpoint.models()]:
        engine = TensorrtLlm(verifier, options, endpoint, f"tensorrt_llm {await _version(endpoint)}")
    else:
        for path in ("/server_info", "/get_server_info"):  # the second is the older name
            info = await _look(endpoint, path)
            if isinstance(info, dict) and "speculative_algorithm" in info:
                engine = Sglang(verifier, options, endpoint, info)
                break
        else:
            raise ValueError(
                f"{url} tells nothing of speculation, neither at /metrics, as vLLM does (unless started with "
                "--disable-log-stats), nor at /server_info, as SGLang does, nor is it TensorRT-LLM: evaluate.endpoint "
                "must be one of these"
            )
    await engine.check()
    trial = prompt_tokens(engine.tokenizer, [{"role": "user", "content": "Name a colour."}])
    await engine.ask(trial, options.draft_depth + 2, options.seed)
    return engine


def _root(endpoint: Endpoint) -> str:
    return endpoint.url.rstrip("/").removesuffix("/v1")


async def _look(endpoint: Endpoint, path: str) -> Any:
    """Read what a server may have; None if it has not."""
    try:
        return await endpoint.send("GET", _root(endpoint) + path)
    except RequestError as trouble:
        if trouble.lasting or trouble.reason == "no JSON":
            return None
        raise


async def _version(endpoint: Endpoint) -> str:
    return str(((await _look(endpoint, "/version")) or {}).get("version", _NO_VERSION))


class Vllm(_Engine):
    """vLLM: its counters before and after each request, or, with several at a time, what it tells of each."""

    definition = f"{DEFINITION}, as vLLM counts"  # of its acceptance length

    async def check(self) -> None:
        """Check that it speculates as is to be measured, and tells so."""
        options, url = self._options, self._endpoint.url
        drafted = len((await self._counters()).speculation.num_accepted_tokens_per_pos)
        if not drafted and options.num_draft_tokens:
            raise ValueError(
                f"{url} serves without a draft head (its /metrics have no vllm:spec_decode counters): start it with "
                "--speculative-config, or set evaluate.num_draft_tokens=0 to measure the verifier alone"
            )
        if options.tree_depth is not None:
            raise ValueError("evaluate.tree_depth must be null with a vLLM, which drafts chains")
        if drafted != options.num_draft_tokens:
            raise ValueError(
                f"evaluate.num_draft_tokens={options.num_draft_tokens}, and {url} drafts {drafted} tokens a round: "
                f"set it to {drafted}, or start the server with num_speculative_tokens={options.num_draft_tokens}"
            )

    async def ask(self, prompt: list[int], max_tokens: int, seed: int) -> Completion:
        """Have a prompt answered; RequestError: there is no answer, ValueError: counts are not of it alone."""
        options = self._options
        before = await self._quiet() if options.batch_size == 1 else None
        body = {"model": self._endpoint.model, "prompt": prompt, "max_tokens": max_tokens, **self._sampling}
        body |= {"return_token_ids": True} | ({"seed": seed} if options.temperature else {})
        seconds, written, text, tokens, counted = await self._post("/completions", body, prompt, _read_vllm)
        if before:
            counts = await self._grown(before, written)
        elif counted is not None or not options.num_draft_tokens:
            counts = read_vllm_answer(counted, options.num_draft_tokens)
        else:
            raise ValueError(
                f"evaluate.batch_size={options.batch_size} needs a server that counts each request: start it "
                "with --per-request-spec-decode-metrics summary, or set evaluate.batch_size=1, which reads /metrics"
            )
        return Completion(self._text(tokens, text), written, seconds, counts)

    async def _counters(self) -> VllmCounters:
        try:
            return read_vllm_counters(await self._endpoint.send("GET", f"{self._root}/metrics"))
        except ValueError as error:
            raise ValueError(f"{self._endpoint.url} is a vLLM that evaluation cannot read: {error}") from None

    async def _quiet(self) -> VllmCounters:
        """Return the counters when nothing runs: a request that was given up may still."""
        began = time.monotonic()
        while (counters := await self._counters()).busy:
            if time.monotonic() - began > _QUIET_S:
                raise ValueError(self._disturbed(f"{counters.busy} requests that are not ours run there"))
            await asyncio.sleep(_POLL_S)
        return counters

    async def _grown(self, before: VllmCounters, written: int) -> ServedCounts:
        """Return what was counted since `before`, once the counters have come to the end of our one request."""
        began = time.monotonic()
        while (after := await self._counters()).requests == before.requests:
            if time.monotonic() - began > _LAG_S:
                raise ValueError(f"{self._endpoint.url} does not count the requests it answers: is it behind a proxy?")
            await asyncio.sleep(_POLL_S)
        requests, tokens = after.requests - before.requests, after.tokens - before.tokens
        if (requests, tokens, after.busy) != (1, written, 0):
            counted = f"it counts {requests} requests and {tokens} tokens where ours were 1 and {written}"
            raise ValueError(self._disturbed(counted))
        return after.speculation.since(before.speculation)

    def _disturbed(self, what: str) -> str:
        return (
            f"{self._endpoint.url} answers others too ({what}), which spoils its counters: leave it to the evaluation; "
            "what is done is saved, the same command goes on"
        )


class Sglang(_Engine):
    """SGLang: every answer tells its own counts."""

    definition = (
        f"{DEFINITION}, as SGLang counts: num_drafts are its verifier forwards, and accepted tokens beyond the "
        "end of an answer may be left out"
    )

    def __init__(self, verifier: VerifierConfig, options: EvaluateConfig, endpoint: Endpoint, info: Any) -> None:
        super().__init__(verifier, options, endpoint, f"sglang {info.get('version', _NO_VERSION)}")
        names = ("algorithm", "num_steps", "num_draft_tokens", "eagle_topk")
        self._info = {name: info.get(f"speculative_{name}") for name in names}  # the rest holds keys

    async def check(self) -> None:
        """Check that it speculates as is to be measured, and tells so."""
        info, top_k = self._info, self._info["eagle_topk"]
        if not info["algorithm"] and self._options.num_draft_tokens:
            cure = "start it with --speculative-algorithm EAGLE3, or set evaluate.num_draft_tokens=0"
            raise ValueError(f"{self._endpoint.url} serves without a draft head: {cure}")
        is_tree = int(top_k or 1) > 1
        theirs = {
            "num_draft_tokens": (info["num_draft_tokens"] or 1) - 1,  # SGLang counts the last accepted token too
            "tree_depth": info["num_steps"] if is_tree else None,
            **({"tree_top_k": top_k} if is_tree else {}),
        }
        if wrong := {name: value for name, value in theirs.items() if getattr(self._options, name) != value}:
            ours = ", ".join(f"evaluate.{name}={getattr(self._options, name)}" for name in wrong)
            there = " ".join(f"evaluate.{name}={'null' if value is None else value}" for name, value in wrong.items())
            raise ValueError(f"{self._endpoint.url} drafts otherwise than {ours}: set {there}")

    async def ask(self, prompt: list[int], max_tokens: int, seed: int) -> Completion:
        """Have a prompt answered; errors as above."""
        body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": max_tokens, **self._sampling}}
        seconds, written, text, tokens, meta = await self._post(f"{self._root}/generate", body, prompt, _read_sglang)
        try:
            counts = read_sglang_answer(meta, self._options.num_draft_tokens, self._options.draft_depth)
        except ValueError as error:
            raise ValueError(f"{self._endpoint.url} is an SGLang that evaluation cannot read: {error}") from None
        return Completion(self._text(tokens, text), written, seconds, counts)


class TensorrtLlm(_Engine):
    """TensorRT-LLM: every answer tells its own counts if the server was started so."""

    definition = (
        f"{DEFINITION}, as TensorRT-LLM counts: num_drafts are its num_spec_steps, iterations without drafts left out"
    )

    async def check(self) -> None:
        """Check that a chain is to be measured; what it drafts its answers tell."""
        if self._options.tree_depth is not None:
            raise ValueError("evaluate.tree_depth must be null with a TensorRT-LLM: only chains are read from it")

    async def ask(self, prompt: list[int], max_tokens: int, seed: int) -> Completion:
        """Have a prompt answered; errors as above."""
        options = self._options
        body = {"model": self._endpoint.model, "prompt": prompt, "max_tokens": max_tokens, **self._sampling}
        body |= {"top_k": options.top_k or 0, "detokenize": False}  # 0 is no limit; without text it tells tokens
        body |= {"seed": seed} if options.temperature else {}
        seconds, written, tokens, counted = await self._post("/completions", body, prompt, _read_tensorrt_llm)
        try:
            counts = read_tensorrt_llm_answer(counted, written, options.num_draft_tokens)
        except ValueError as error:
            raise ValueError(f"{self._endpoint.url} is a TensorRT-LLM that evaluation cannot read: {error}") from None
        return Completion(self._text(tokens), written, seconds, counts)


def _read_vllm(response: Any) -> tuple[Any, ...]:
    choice, usage = response["choices"][0], response["usage"]
    counted = (response.get("metrics") or {}).get("speculative_decoding")
    numbers = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return *numbers, choice["text"], choice.get("token_ids"), counted


def _read_sglang(response: Any) -> tuple[Any, ...]:
    meta = response["meta_info"]
    numbers = meta["prompt_tokens"], int(meta["completion_tokens"])
    return *numbers, response["text"], response.get("output_ids"), meta


def _read_tensorrt_llm(response: Any) -> tuple[Any, ...]:
    choice, usage = response["choices"][0], response["usage"]
    numbers = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
    return *numbers, choice["token_ids"], choice.get("speculative_decoding")


ServingEngine = Vllm | Sglang | TensorrtLlm
