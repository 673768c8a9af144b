"""OpenAI-compatible servers of one verifier: which of them takes the next request, and what their errors mean."""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
import openai

from ...conf.schema import SynthesizeConfig
from ..conversations import Answer
from ..tokens.chat_template import Turn

_FIRST_WINDOW = 16
_LET_PASS = 0.1
_CONNECT_S = 10.0
_STRIKES = 3  # troubles in a row after which an endpoint is asked whether it is there
_MOST_PAUSE_S = 300.0
_CONTEXT_WORDS = (
    *("context length", "context window", "context size", "context_length", "max_model_len"),
    *("maximum sequence length", "max_seq_len", "max_num_tokens"),
)
_NEEDED = {  # fields of an answer that not every server gives, and what for
    "choices[0].finish_reason": "which fledge needs to tell an answer that was cut from one that ended",
    "usage.prompt_tokens": "which fledge needs to compare its tokens with the verifier's",
    "usage.completion_tokens": "which fledge needs to count tokens",
}
_OF_THE_REQUEST = (400, 413, 415, 422)  # other refusals are of whoever asks, or of all there is to ask


class Window:
    """How many requests an endpoint is given at once.

    As TCP's: it doubles in a round trip until the server first pushes back, is halved then, once for all requests
    that were on their way, and grows by one a round trip from there. Up to one push-back in ten answers is let pass.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._size = float(min(_FIRST_WINDOW, most))
        self._doubles_below = float(most)
        self._halved_at = 0.0
        self._pushed_back = 0.0  # requests, each answer making up for a tenth of one

    @property
    def size(self) -> int:
        """Requests allowed."""
        return int(self._size)

    def grow(self) -> None:
        """Take note of an answer."""
        self._size = min(self._most, self._size + (1.0 if self._size < self._doubles_below else 1.0 / self._size))
        self._pushed_back = max(0.0, self._pushed_back - _LET_PASS)

    def shrink(self, started: float) -> None:
        """Take note that the server pushed back a request that was sent at `started`."""
        if started < self._halved_at:
            return
        self._pushed_back += 1.0
        if self._pushed_back > _LET_PASS * self._size:
            self._size = self._doubles_below = max(1.0, self._size / 2)
            self._halved_at, self._pushed_back = time.monotonic(), 0.0


@dataclass(eq=False)
class RequestError(Exception):
    """A request that gave no answer."""

    reason: str  # few words, the same for all of a kind
    detail: str
    lasting: bool = False  # the same request would fail again
    busy: bool = False  # the server has too much to do
    pushed_back: bool = False  # and said so, without having tried
    pause_s: float = 0.0  # what it asks for
    context_full: bool = False
    refuses_us: bool = False  # perhaps no request of ours would do
    lacking: str = ""  # a field that is needed, which the answer has not

    def __str__(self) -> str:
        return f"{self.reason}, {self.detail}"


class Endpoint:
    """One server: its client, its window, and whether it is up.

    Args:
        by_proxy: ask through the proxy that the environment names, if it does.
    """

    def __init__(self, url: str, options: SynthesizeConfig, by_proxy: bool = True) -> None:
        limits = type(openai.DEFAULT_CONNECTION_LIMITS)(
            max_connections=options.concurrency + 1, max_keepalive_connections=options.concurrency + 1
        )
        timeout = openai.Timeout(options.request_timeout_s, connect=min(_CONNECT_S, options.request_timeout_s))
        self.url = url
        self.window = Window(options.concurrency)
        self.in_flight = 0
        self.up = False
        self.model = ""  # its name for the verifier
        self.max_context = 0  # tokens of prompt and answer
        self.answered_at = 0.0  # by time.monotonic()
        self.extras: dict[str, Any] = {}  # fields of a request that not every server takes, and this one does
        self._strikes = 0
        self._not_before = 0.0
        self._client = openai.AsyncOpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            max_retries=0,  # retries are ours: they may go to another server
            timeout=timeout,
            http_client=openai.DefaultAioHttpClient(limits=limits, timeout=timeout, trust_env=by_proxy),
        )

    @property
    def paused(self) -> bool:
        """Whether the server wants to be left alone for a while."""
        return time.monotonic() < self._not_before

    @property
    def free(self) -> int:
        """Requests it could be given now."""
        return self.window.size - self.in_flight if self.up and not self.paused else 0

    @property
    def suspect(self) -> bool:
        """Whether it has failed so often in a row that it may be gone."""
        return self._strikes >= _STRIKES

    async def ask(self, body: dict[str, Any]) -> Answer:
        """Ask for a chat completion.

        Raises:
            RequestError: there is no usable one.
        """
        started = time.monotonic()
        try:
            answer = read_answer(await self.send("POST", "/chat/completions", {"model": self.model, **body}))
            needed = answer.prompt_tokens + body["max_tokens"]
            if needed > self.max_context:  # vLLM cuts the answer to what is left, others the prompt
                raise RequestError("context full", "", lasting=True, context_full=True)
        except RequestError as trouble:
            if trouble.busy:
                self.window.shrink(started)
                self._not_before = max(self._not_before, time.monotonic() + trouble.pause_s)
            if not trouble.pushed_back and (trouble.refuses_us or not trouble.lasting):
                self._strikes += 1
            raise
        self._strikes, self.answered_at = 0, time.monotonic()
        self.window.grow()
        return answer

    async def models(self) -> list[dict[str, Any]]:
        """Give what the server says it serves; nothing where it does not tell, or has no such list (404, 405).

        Raises:
            RequestError: no server answers, or it refuses our key.
        """
        try:
            listed = await self.send("GET", "/models")
        except RequestError as trouble:
            no_list = trouble.reason in ("HTTP 404", "HTTP 405")
            if not no_list and (trouble.refuses_us or not trouble.reason.startswith("HTTP")):
                raise
            return []
        models = listed.get("data") if isinstance(listed, dict) else None
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []

    async def send(self, method: str, path: str, body: dict[str, Any] | None = None, kind: type[Any] = object) -> Any:
        """Send a request and give what comes back.

        Args:
            path: below the base URL, or a whole URL.
            kind: of what a GET gives: object, its JSON; str, its text.

        Raises:
            RequestError: there is nothing usable.
        """
        try:
            if method == "GET":
                return await self._client.get(path, cast_to=kind)
            return await self._client.post(path, cast_to=object, body=body)  # unparsed: half the time of a typed call
        except (openai.OpenAIError, ValueError) as error:  # ValueError: no JSON
            raise request_error(error) from error

    def revive(self) -> None:
        """Take it into service."""
        self._strikes, self.up, self.answered_at = 0, True, time.monotonic()

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


def read_answer(response: Any) -> Answer:
    """Read a chat completion; its tokens too, where the server gives them (vLLM's `return_token_ids`)."""
    try:
        choice = response["choices"][0]
        message, finish_reason = choice["message"], choice.get("finish_reason")
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        turn = None
        if (prompt := response.get("prompt_token_ids")) and (tokens := choice.get("token_ids")):
            turn = Turn(prompt, tokens)
        usage = response.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        counts = [len(turn.prompt), len(turn.answer)] if turn else counts
        needed: dict[str, Any] = {"choices[0].finish_reason": finish_reason}
        needed |= dict(zip(("usage.prompt_tokens", "usage.completion_tokens"), counts, strict=True))
        if lacking := [name for name, value in needed.items() if value is None]:
            raise RequestError(f"an answer without {lacking[0]}", _NEEDED[lacking[0]], lacking=lacking[0])
        f"{text}{reasoning}".encode()
        answer = Answer(
            text=text,
            finish_reason=finish_reason,
            prompt_tokens=int(needed["usage.prompt_tokens"]),
            completion_tokens=int(needed["usage.completion_tokens"]),
            reasoning=reasoning,
            turn=turn,
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RequestError("no chat completion", f"{error!r} in {str(response)[:200]}") from None
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise RequestError("no chat completion", f"no text in {str(response)[:200]}")
    if answer.finish_reason not in ("stop", "length"):
        raise RequestError(f"finish_reason {answer.finish_reason}", str(response)[:200])
    return answer


def request_error(error: Exception) -> RequestError:
    """Say what an error of the client means for the request and its server."""
    detail = _shortened(error)
    if isinstance(error, openai.APIConnectionError):  # time-outs are of that kind too, and what aiohttp cannot reach
        lost = next((cause for cause in _causes(error) if isinstance(cause, aiohttp.ClientConnectionError)), None)
        if isinstance(error, openai.APITimeoutError) and (lost is None or isinstance(lost, aiohttp.ServerTimeoutError)):
            return RequestError("time-out", detail, busy=True)
        return RequestError("connection lost", _shortened(lost or error.__cause__ or error))
    if not isinstance(error, openai.APIStatusError):
        return RequestError("no JSON", detail)
    status, reason = error.status_code, f"HTTP {error.status_code}"
    if status in (429, 503, 529):
        pause_s = _retry_after(error.response.headers.get("retry-after"))
        return RequestError(reason, detail, busy=True, pushed_back=True, pause_s=pause_s)
    if status >= 500 or status in (408, 409, 425):
        return RequestError(reason, detail)
    full = any(words in detail.lower() for words in _CONTEXT_WORDS)
    return RequestError(reason, detail, lasting=True, context_full=full, refuses_us=status not in _OF_THE_REQUEST)


def _shortened(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(value: str | None) -> float:
    """Read Retry-After: seconds, or a date (RFC 9110, 10.2.3)."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(0.0, seconds), _MOST_PAUSE_S)
