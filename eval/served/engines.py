"""vLLM and SGLang as evaluation sees them: one answer to a prompt of tokens, and what speculation did for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ...conf.schema import Config, EvaluateConfig
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
    read_vllm_answer,
    read_vllm_counters,
)

_POLL_S, _LAG_S, _QUIET_S = 0.01, 20.0, 60.0


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt of tokens, and how it is to be continued."""

    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """An answer, and what speculation did for it."""

    text: str
    output_tokens: int  # end-of-turn included
    seconds: float  # of the whole request, the prompt included
    counts: ServedCounts


class ServingEngine(Protocol):
    """A server that is known to serve the verifier with a draft head, drafting as the options say."""

    name: str  # and version
    definition: str  # of its acceptance length

    async def ask(self, request: CompletionRequest) -> Completion:
        """Have a prompt answered.

        Raises:
            RequestError: there is no answer.
            ValueError: what was counted is not of this answer alone.
        """


async def open_engine(config: Config, endpoint: Endpoint) -> ServingEngine:
    """Find out what serves at an endpoint, and make sure that it is the verifier, and speculates as is to be measured.

    Raises:
        RequestError: it does not answer.
        ValueError: it serves something else, or without a draft head, or drafts otherwise.
    """
    positions = load_config(config.verifier).max_position_embeddings
    find_model(endpoint, await endpoint.models(), config.synthesize.model, config.verifier, positions)
    root = endpoint.url.rstrip("/").removesuffix("/v1")
    metrics = await _look(endpoint, f"{root}/metrics")
    if isinstance(metrics, str) and is_vllms(metrics):
        version = (await _look(endpoint, f"{root}/version")) or {}
        engine: Vllm | Sglang = Vllm(config, endpoint, root, f"vllm {version.get('version', '(version not told)')}")
    else:
        for path in ("/server_info", "/get_server_info"):  # the second is the older name
            info = await _look(endpoint, root + path)
            if isinstance(info, dict) and "speculative_algorithm" in info:
                engine = Sglang(config, endpoint, root, info)
                break
        else:
            raise ValueError(unsupported_server(endpoint.url, metrics))
    await engine.check()
    return engine


async def _look(endpoint: Endpoint, url: str) -> Any:
    """Read what a server may have; None if it has not."""
    try:
        return await endpoint.send("GET", url)
    except RequestError as trouble:
        if trouble.lasting or trouble.reason == "no JSON":
            return None
        raise


def unsupported_server(url: str, metrics: Any) -> str:
    """Return the sentence that a server is none whose speculation can be measured."""
    if isinstance(metrics, list):
        return (
            f"{url} answers /metrics as TensorRT-LLM does, which is not supported: serve the head with vLLM or SGLang"
        )
    return (
        f"{url} tells nothing of speculation, neither at /metrics, as vLLM does (unless started with "
        "--disable-log-stats), nor at /server_info, as SGLang does: evaluate.endpoint must be one of these two"
    )


def _sampling(options: EvaluateConfig) -> dict[str, Any]:
    """Return the fields of a request that both engines know, with whatever would make greedy less than greedy."""
    return {
        "temperature": options.temperature,
        "top_p": options.top_p,
        "top_k": options.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


class _Engine:
    """What both have in common: the verifier's tokenizer, and a first request."""

    def __init__(self, config: Config, endpoint: Endpoint, root: str, name: str) -> None:
        self.name = name
        self._config, self._options = config, config.evaluate
        self._endpoint, self._root = endpoint, root
        self._tokenizer = load_tokenizer(config.verifier)
        self._end_token_ids = load_end_token_ids(config.verifier, self._tokenizer)

    async def ask(self, request: CompletionRequest) -> Completion:
        raise NotImplementedError

    async def _try(self) -> None:
        prompt = prompt_tokens(self._tokenizer, [{"role": "user", "content": "Name a colour."}])
        await self.ask(CompletionRequest(prompt, self._options.draft_depth + 2, self._options.seed))

    async def _post(self, path: str, body: dict[str, Any], read: Callable[[Any], Any]) -> tuple[Any, float]:
        """Send a request; give what is read of its answer, and its seconds."""
        started = time.perf_counter()
        response = await self._endpoint.send("POST", path, body)
        seconds = time.perf_counter() - started
        try:
            return read(response), seconds
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            what = f"an answer without {error}" if isinstance(error, KeyError) else f"no completion ({error!r})"
            raise ValueError(
                f"{self._endpoint.url} gave {what}; evaluation needs a completion and its counts: {str(response)[:200]}"
            ) from None

    def _check_prompt(self, request: CompletionRequest, read: int) -> None:
        if read != len(request.prompt):
            raise ValueError(f"{self._endpoint.url} read {read} tokens of a prompt of {len(request.prompt)}")


class Vllm(_Engine):
    """vLLM: its counters before and after each request, or, with several at a time, what it tells of each."""

    definition = f"{DEFINITION}, as vLLM counts"

    async def check(self) -> None:
        """Check that it speculates as is to be measured, and tells so."""
        options, url = self._options, self._endpoint.url
        counters = await self._counters()
        drafted = len(counters.speculation.num_accepted_tokens_per_pos)
        if options.tree_depth is not None:
            raise ValueError("evaluate.tree_depth must be null with a vLLM, which drafts chains")
        if drafted != options.num_draft_tokens:
            raise ValueError(
                f"evaluate.num_draft_tokens={options.num_draft_tokens}, and {url} drafts {drafted} tokens a round: "
                f"set it to {drafted}, or start the server with num_speculative_tokens={options.num_draft_tokens}"
            )
        await self._try()

    async def ask(self, request: CompletionRequest) -> Completion:
        alone = self._options.batch_size == 1
        before = await self._quiet() if alone else None
        body = {
            "model": self._endpoint.model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "stop_token_ids": self._end_token_ids,
            "return_token_ids": True,
            **_sampling(self._options),
            **({"seed": request.seed} if self._options.temperature else {}),
        }
        (choice, usage, told), seconds = await self._post(
            "/completions",
            body,
            lambda r: (
                r["choices"][0],
                {name: int(r["usage"][name]) for name in ("prompt_tokens", "completion_tokens")},
                r.get("metrics") or {},
            ),
        )
        self._check_prompt(request, usage["prompt_tokens"])
        written = usage["completion_tokens"]
        counts = await self._grown(before, written) if before else self._of_answer(told.get("speculative_decoding"))
        return Completion(
            answer_text(self._tokenizer, choice.get("token_ids"), choice["text"]), written, seconds, counts
        )

    def _of_answer(self, told: dict[str, Any] | None) -> ServedCounts:
        if told is None:
            raise ValueError(
                f"evaluate.batch_size={self._options.batch_size} needs a server that counts each request: start it "
                "with --per-request-spec-decode-metrics summary, or set evaluate.batch_size=1, which reads /metrics"
            )
        return read_vllm_answer(told, self._options.num_draft_tokens)

    async def _counters(self) -> VllmCounters:
        try:
            counters = read_vllm_counters(await self._endpoint.send("GET", f"{self._root}/metrics"))
        except ValueError as error:
            raise ValueError(f"{self._endpoint.url} is a vLLM that evaluation cannot read: {error}") from None
        if counters is None:
            raise ValueError(
                f"{self._endpoint.url} serves without a draft head (its /metrics have no vllm:spec_decode counters): "
                "start it with --speculative-config"
            )
        return counters

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
            raise ValueError(
                self._disturbed(f"it counts {requests} requests and {tokens} tokens where ours were 1 and {written}")
            )
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

    def __init__(self, config: Config, endpoint: Endpoint, root: str, info: dict[str, Any]) -> None:
        super().__init__(config, endpoint, root, f"sglang {info.get('version', '(version not told)')}")
        self._info = {name: info.get(f"speculative_{name}") for name in ("algorithm", "num_steps", "num_draft_tokens")}
        self._info["top_k"] = info.get("speculative_eagle_topk")

    async def check(self) -> None:
        """Check that it speculates as is to be measured, and tells so."""
        options, info = self._options, self._info
        if not info["algorithm"]:
            raise ValueError(
                f"{self._endpoint.url} serves without a draft head: start it with --speculative-algorithm EAGLE3"
            )
        is_tree = int(info["top_k"] or 1) > 1
        theirs = {
            "num_draft_tokens": (info["num_draft_tokens"] or 0) - 1,  # SGLang counts the last accepted token too
            "tree_depth": info["num_steps"] if is_tree else None,
            **({"tree_top_k": info["top_k"]} if is_tree else {}),
        }
        if wrong := {name: value for name, value in theirs.items() if getattr(options, name) != value}:
            ours = ", ".join(f"evaluate.{name}={getattr(options, name)}" for name in wrong)
            there = " ".join(f"evaluate.{name}={'null' if value is None else value}" for name, value in wrong.items())
            raise ValueError(f"{self._endpoint.url} drafts otherwise than {ours}: set {there}")
        await self._try()

    async def ask(self, request: CompletionRequest) -> Completion:
        body = {
            "input_ids": request.prompt,
            "sampling_params": {
                "max_new_tokens": request.max_tokens,
                "stop_token_ids": self._end_token_ids,
                **_sampling(self._options),
            },
        }
        (text, tokens, meta), seconds = await self._post(
            f"{self._root}/generate", body, lambda r: (r["text"], r.get("output_ids"), r["meta_info"])
        )
        self._check_prompt(request, meta["prompt_tokens"])
        try:
            counts = read_sglang_answer(meta, self._options.num_draft_tokens, self._options.draft_depth)
        except ValueError as error:
            raise ValueError(f"{self._endpoint.url} is an SGLang that evaluation cannot read: {error}") from None
        return Completion(answer_text(self._tokenizer, tokens, text), int(meta["completion_tokens"]), seconds, counts)
