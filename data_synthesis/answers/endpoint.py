"""OpenAI-compatible servers of one verifier: which of them takes the next request, and what their errors mean."""

import asyncio
import email.utils
import json
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from requests.utils import get_environ_proxies, select_proxy

from ...conf.schema import SynthesizeConfig
from ..tokens.chat_template import Turn
from .conversation import Answer

_FIRST_WINDOW = 16
_LET_PASS = 0.1
_CONNECT_S = 10.0
_KEEP_ALIVE_S = 5.0  # of an idle connection: engines close theirs about then
_STRIKES = 3  # troubles in a row after which an endpoint is out of service until it answers a probe
_MOST_PAUSE_S = 300.0
_CONTEXT_WORDS = (
    *("context length", "context window", "context size", "context_length", "max_model_len"),
    *("maximum sequence length", "max_seq_len", "max_num_tokens"),
)
_REQUIRED = {  # fields of an answer that not every server gives, and what for
    "choices[0].finish_reason": "which fledge needs to tell an answer that was cut from one that ended",
    "usage.prompt_tokens": "which fledge needs to compare its tokens with the verifier's",
    "usage.completion_tokens": "which fledge needs to count tokens",
}
_OF_THE_REQUEST = (400, 413, 415, 422)  # other refusals are of whoever asks, or of all there is to ask


class Window:
    """How many requests an endpoint gets at once.

    As TCP's: it doubles in a round trip until the server first pushes back, is halved then, once for all requests
    that were on their way, and grows by one a round trip from there. Up to one push-back in ten answers is let pass.
    """

    def __init__(self, most: int) -> None:
        self._most, self._size = most, float(min(_FIRST_WINDOW, most))
        self._doubles_below, self._halved_at = float(most), 0.0
        self._pushed_back = 0.0  # requests, each answer making up for a tenth of one

    @property
    def size(self) -> int:
        """Requests allowed."""
        return int(self._size)

    def grow(self) -> None:
        """Count an answer."""
        self._size = min(self._most, self._size + (1.0 if self._size < self._doubles_below else 1.0 / self._size))
        self._pushed_back = max(0.0, self._pushed_back - _LET_PASS)

    def shrink(self, started: float) -> None:
        """Count that the server pushed back a request that was sent at `started`."""
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

    @property
    def final(self) -> bool:
        """Whether this request would fail again, and others would not."""
        return self.lasting and not self.refuses_us


class Endpoint:
    """One server: its connections, its window, and whether it is in service.

    With `by_proxy` it is reached by the proxy that the environment names, if it does.
    """

    def __init__(self, url: str, options: SynthesizeConfig, by_proxy: bool = True) -> None:
        self.url = url
        self.window = Window(options.concurrency)
        self.in_flight = 0
        self.lost = asyncio.Event()  # out of service, until it is opened (again)
        self.lost.set()
        self.tried = asyncio.Event()  # to open it; `trouble` says why it was in vain
        self.trouble: Exception | None = None
        self.model = ""  # its name for the verifier
        self.max_context = 0  # tokens of prompt and answer
        self.answered_at = 0.0  # by time.monotonic()
        self.extras: dict[str, Any] = {}  # fields of a request that not every server takes, and this one does
        self._strikes, self._not_before = 0, 0.0
        self._options = options
        self._proxy = _environment_proxy(url) if by_proxy else None
        self._session: aiohttp.ClientSession | None = None

    @property
    def up(self) -> bool:
        """Whether it is in service."""
        return not self.lost.is_set()

    @property
    def paused(self) -> bool:
        """Whether the server wants to be left alone for a while."""
        return time.monotonic() < self._not_before

    @property
    def free(self) -> int:
        """Requests that may be sent to it now."""
        return self.window.size - self.in_flight if self.up and not self.paused else 0

    async def ask(self, body: dict[str, Any], path: str = "/chat/completions") -> Answer:
        """Return a completion, or raise RequestError; several in a row put the endpoint out of service."""
        started = time.monotonic()
        try:
            answer = read_answer(await self.send("POST", path, {"model": self.model, **body}))
            if answer.prompt_tokens + body["max_tokens"] > self.max_context:
                # vLLM cuts the answer to what is left, others the prompt
                raise RequestError("context full", "", lasting=True, context_full=True)
        except RequestError as trouble:
            if trouble.busy:
                self.window.shrink(started)
                self._not_before = max(self._not_before, time.monotonic() + trouble.pause_s)
            self._strikes += not trouble.pushed_back and not trouble.final
            if self._strikes >= _STRIKES:
                self.lost.set()
            raise
        self._strikes, self.answered_at = 0, time.monotonic()
        self.window.grow()
        return answer

    async def models(self) -> list[dict[str, Any]]:
        """Return what the server says it serves; nothing if it does not tell, or has no such list (404, 405).

        Raises RequestError if no server answers, or it refuses our key.
        """
        try:
            reply = await self.send("GET", "/models")
        except RequestError as trouble:
            no_list = trouble.reason in ("HTTP 404", "HTTP 405")
            if not no_list and (trouble.refuses_us or not trouble.reason.startswith("HTTP")):
                raise
            return []
        models = reply.get("data") if isinstance(reply, dict) else None
        return [model for model in models if isinstance(model, dict)] if isinstance(models, list) else []

    async def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to a path below the base URL, or a whole URL; return the reply's JSON, or its text.

        Raises RequestError if there is nothing usable.
        """
        self._session = self._session or self._connect()
        url = path if "://" in path else self.url.rstrip("/") + path
        try:
            async with self._session.request(method, url, json=body, proxy=self._proxy) as response:
                content = await response.read()
        except aiohttp.ServerTimeoutError as error:
            raise RequestError("time-out", "Request timed out.", busy=True) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: no address, or a proxy it cannot use
            raise RequestError("connection lost", _shortened(error)) from error
        if not 200 <= response.status < 300:
            raise status_error(response.status, await response.text(errors="replace"), response.headers)
        if not response.content_type.endswith("json"):
            return await response.text(errors="replace")
        try:
            return json.loads(content)
        except ValueError as error:
            raise RequestError("no JSON", _shortened(error)) from error

    def _connect(self) -> aiohttp.ClientSession:
        connections = aiohttp.TCPConnector(limit=self._options.concurrency + 1, keepalive_timeout=_KEEP_ALIVE_S)
        longest = self._options.request_timeout_s
        timeout = aiohttp.ClientTimeout(connect=longest, sock_connect=min(_CONNECT_S, longest), sock_read=longest)
        key = os.environ.get("OPENAI_API_KEY") or "none"
        headers = {"Authorization": f"Bearer {key}", "Accept": "application/json", "User-Agent": "fledge"}
        return aiohttp.ClientSession(connector=connections, timeout=timeout, headers=headers)

    def revive(self) -> None:
        """Take it into service."""
        self._strikes, self.answered_at = 0, time.monotonic()
        self.lost.clear()

    async def close(self) -> None:
        """Close its connections."""
        if self._session is not None:
            await self._session.close()


def _environment_proxy(url: str) -> str | None:
    """Return the proxy that the environment names for an address; aiohttp knows no networks in `no_proxy`."""
    proxy = select_proxy(url, get_environ_proxies(url))
    return proxy if not proxy or "://" in proxy else f"http://{proxy}"


def read_answer(response: Any) -> Answer:
    """Read a completion of a chat or a raw prompt, with its tokens if the server gives them (`return_token_ids`)."""
    try:
        choice = response["choices"][0]
        message = {"content": choice["text"]} if "text" in choice else choice["message"]
        finish_reason = choice.get("finish_reason")
        text, reasoning = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
        prompt = response.get("prompt_token_ids") or choice.get("prompt_token_ids")
        tokens, usage = choice.get("token_ids"), response.get("usage") or {}
        turn = Turn(prompt, tokens) if prompt and tokens else None
        counts: list[Any] = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
        counts = [len(turn.prompt), len(turn.answer)] if turn else counts
        for (name, purpose), value in zip(_REQUIRED.items(), (finish_reason, *counts), strict=True):
            if value is None:
                raise RequestError(f"an answer without {name}", purpose, lacking=name)
        f"{text}{reasoning}".encode()  # JSON can spell half a character
        answer = Answer(text, finish_reason, int(counts[0]), int(counts[1]), reasoning, turn)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise RequestError("no chat completion", f"{error!r} in {str(response)[:200]}") from None
    if not isinstance(text, str) or not isinstance(reasoning, str | None):
        raise RequestError("no chat completion", f"no text in {str(response)[:200]}")
    if answer.finish_reason not in ("stop", "length"):
        raise RequestError(f"finish_reason {answer.finish_reason}", str(response)[:200])
    return answer


def status_error(status: int, text: str, headers: Mapping[str, str]) -> RequestError:
    """Return what an HTTP status other than success, and the text that came with it, mean for request and server."""
    reason, detail = f"HTTP {status}", f"Error code: {status}"
    try:
        content = json.loads(text)
        message = content.get("error", content)["message"]
        detail += f" - {message}" if message and isinstance(message, str) else ""
    except (ValueError, AttributeError, KeyError, TypeError):
        pass  # it gives no reason, or in a form of its own
    detail = _shortened(detail)
    if status in (429, 503, 529):
        pause_s = _retry_after(headers.get("retry-after", "0"))
        return RequestError(reason, detail, busy=True, pushed_back=True, pause_s=pause_s)
    if (status >= 500 and status not in (501, 505)) or status in (408, 409, 425):  # 501, 505: it never will
        return RequestError(reason, detail)
    full = any(words in detail.lower() for words in _CONTEXT_WORDS)
    return RequestError(reason, detail, lasting=True, context_full=full, refuses_us=status not in _OF_THE_REQUEST)


def _shortened(error: Exception | str) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _retry_after(value: str) -> float:
    """Read Retry-After: seconds, or a date (RFC 9110, 10.2.3)."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return 0.0
    return min(max(0.0, seconds), _MOST_PAUSE_S)


class Pool:
    """The endpoints, and who waits for one: conversations that go on come before new ones.

    At most `concurrency` conversations run for each endpoint; some are between two tries, without a slot.
    """

    def __init__(self, concurrency: int) -> None:
        self.endpoints: list[Endpoint] = []
        self.conversations = 0  # that have begun and not ended
        self.closed = False  # to new conversations
        self._concurrency = concurrency
        self._waiting = deque[asyncio.Future[None]]()

    async def take(self, preferred: Endpoint | None = None, avoided: Endpoint | None = None) -> Endpoint | None:
        """Wait for a free slot of an endpoint; None for a new conversation once closed to those.

        One that goes on gets its `preferred` endpoint if it has a slot, and the `avoided` one if no other has.
        """
        while preferred or not self.closed:
            free = [endpoint for endpoint in self.endpoints if endpoint.free > 0]
            if free and (preferred or self.conversations < self._concurrency * len(self.endpoints)):
                best = max(free, key=lambda e: (e is not avoided, e is preferred, e.free))
                best.in_flight += 1
                return best
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            (self._waiting.appendleft if preferred else self._waiting.append)(waiter)
            await waiter
        return None

    def wake(self) -> None:
        """Let as many look again as there are slots, or everyone once closed."""
        slots = len(self._waiting) if self.closed else sum(max(0, endpoint.free) for endpoint in self.endpoints)
        for waiter in [self._waiting.popleft() for _ in range(min(slots, len(self._waiting)))]:
            if not waiter.done():
                waiter.set_result(None)


class Slot:
    """A conversation's slot of an endpoint, held from turn to turn so that the server's prefix cache serves it."""

    def __init__(self, pool: Pool, endpoint: Endpoint) -> None:
        self._pool, self._endpoint, self._held = pool, endpoint, True
        self._avoided: Endpoint | None = None
        pool.conversations += 1

    async def endpoint(self) -> Endpoint:
        """Return the endpoint to ask next: the same while it is up."""
        if not self._endpoint.up or self._endpoint.paused:
            self.release()
        if not self._held:
            endpoint = await self._pool.take(self._endpoint, self._avoided)
            assert endpoint is not None
            self._endpoint, self._held = endpoint, True
        return self._endpoint

    def release(self, failed: bool = False) -> None:
        """Give the slot back; if the endpoint has `failed`, another is tried next if there is one."""
        if self._held:
            self._held, self._avoided = False, self._endpoint if failed else None
            self._endpoint.in_flight -= 1
        self._pool.wake()

    def end(self) -> None:
        """Give the slot back: the conversation has ended."""
        self._pool.conversations -= 1
        self.release()
