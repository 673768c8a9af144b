"""The verifier answers through OpenAI-compatible servers: vLLM, SGLang, TensorRT-LLM and whatever speaks as they do."""

from __future__ import annotations

import asyncio
import random
import resource
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..conf.run import EXIT_AGAIN
from ..conf.schema import Config
from ..conf.signals import StopSignals
from ..models.verifier import load_config, load_tokenizer
from .chat import Message, prompt_tokens
from .conversations import CONTEXT_FULL, Answer, Conversation, Failure
from .endpoints import Endpoint, RequestError
from .outcomes import Outcomes
from .prompts import Prompt
from .split import is_heldout

_TICK_S = 0.1
_HOPELESS = 50  # conversations that fail before any is made: nothing more is tried
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # between the tries of a request, doubling
_OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")
_PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
_PROBE: list[Message] = [{"role": "user", "content": "Name a colour."}]


def answer_by_servers(config: Config, prompts: Iterable[Prompt], outcomes: Outcomes, signals: StopSignals) -> None:
    """Answer the prompts that are wanted, as many at once as the servers of `synthesize.endpoints` take.

    Raises:
        ValueError: no server answers, or one serves something else than the verifier.
    """
    _allow_open_files(config)
    asyncio.run(_Regeneration(config, outcomes, signals).run(prompts))


def _allow_open_files(config: Config) -> None:
    """Raise the limit of open files to what the connections need, as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + config.synthesize.concurrency * len(config.synthesize.endpoints)
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class _Pool:
    """The endpoints, and who waits for one: conversations that go on come before new ones."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self.endpoints = endpoints
        self.closed = False  # to new conversations
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def take(self, preferred: Endpoint | None = None) -> Endpoint | None:
        """Wait for a free place at an endpoint, at the preferred one if it has one; None once closed to new ones."""
        while True:
            if preferred is None and self.closed:
                return None
            best = preferred if preferred and preferred.free > 0 else max(self.endpoints, key=lambda e: e.free)
            if best.free > 0:
                best.in_flight += 1
                return best
            place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            if preferred:
                self._waiting.appendleft(place)
            else:
                self._waiting.append(place)
            await place

    def give_back(self, endpoint: Endpoint) -> None:
        """Leave a place to the next who waits."""
        endpoint.in_flight -= 1
        self.wake()

    def wake(self, everyone: bool = False) -> None:
        """Let as many look again as there are places."""
        places = sum(max(0, endpoint.free) for endpoint in self.endpoints)
        while self._waiting and (everyone or places > 0):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
                places -= 1

    def close(self) -> None:
        """Take no new conversation."""
        self.closed = True
        self.wake(everyone=True)


class _Seat:
    """A conversation's place at an endpoint, kept from turn to turn so that the server's cache serves it."""

    def __init__(self, pool: _Pool, endpoint: Endpoint) -> None:
        self._pool, self._endpoint, self._seated = pool, endpoint, True

    async def endpoint(self) -> Endpoint:
        """Give the endpoint to ask next: the same while it is up."""
        if self._seated and (not self._endpoint.up or self._endpoint.paused):
            self.leave()
        if not self._seated:
            found = await self._pool.take(self._endpoint)
            assert found is not None
            self._endpoint, self._seated = found, True
        return self._endpoint

    def leave(self) -> None:
        """Give the place back."""
        if self._seated:
            self._seated = False
            self._pool.give_back(self._endpoint)


class _Regeneration:
    """One start of the stage against servers."""

    def __init__(self, config: Config, outcomes: Outcomes, signals: StopSignals) -> None:
        self._config, self._options = config, config.synthesize
        self._outcomes, self._signals = outcomes, signals
        self._positions = load_config(config.verifier).max_position_embeddings
        self._probe_tokens = prompt_tokens(load_tokenizer(config.verifier), _PROBE)
        self._rows: set[asyncio.Task[None]] = set()
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._error: BaseException | None = None  # that ends the stage

    async def run(self, prompts: Iterable[Prompt]) -> None:
        self._pool = _Pool([Endpoint(url, self._options) for url in self._options.endpoints])
        watch = asyncio.create_task(self._watch())
        try:
            await self._open_endpoints()
            await self._feed(prompts)
            await self._finish()
        finally:
            for task in (watch, *self._checks.values(), *self._rows):
                task.cancel()
            await asyncio.gather(watch, *self._checks.values(), *self._rows, return_exceptions=True)
            for endpoint in self._pool.endpoints:
                await endpoint.close()
        if self._error:
            raise self._error

    async def _feed(self, prompts: Iterable[Prompt]) -> None:
        """Start a conversation whenever an endpoint has a place free."""
        most = self._options.concurrency * len(self._options.endpoints)
        for prompt in prompts:
            if not self._outcomes.wants(prompt.id):
                continue
            while len(self._rows) >= most:  # some of them between two tries, without a place
                await asyncio.wait(self._rows, return_when=asyncio.FIRST_COMPLETED)
            endpoint = await self._pool.take()
            if endpoint is None:
                return
            row = asyncio.create_task(self._converse(prompt, endpoint))
            self._rows.add(row)
            row.add_done_callback(self._row_ended)
            self._outcomes.in_flight = len(self._rows)

    def _row_ended(self, row: asyncio.Task[None]) -> None:
        self._rows.discard(row)
        if not row.cancelled() and (error := row.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._pool.close()

    async def _finish(self) -> None:
        """Wait for what is in flight: to its end, for the grace after a signal, not at all after an error."""
        stopped_at: float | None = None
        while self._rows and not self._error:
            if self._signals.received and stopped_at is None:
                stopped_at = time.monotonic()
                print(
                    f"synthesize: {self._signals.name}, {len(self._rows)} conversations in flight have "
                    f"{self._options.grace_s:.0f} s (synthesize.grace_s)",
                    file=sys.stderr,
                )
            if stopped_at is not None and time.monotonic() - stopped_at >= self._options.grace_s:
                return
            await asyncio.wait(self._rows, timeout=_TICK_S)

    async def _watch(self) -> None:
        """Look at the clock: signals, pauses that are over, servers that stay away."""
        last_up = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            if self._signals.received:
                self._pool.close()
            if any(endpoint.up for endpoint in self._pool.endpoints):
                last_up = time.monotonic()
            elif time.monotonic() - last_up > self._options.server_wait_s:
                print(
                    f"fledge: no server has answered for {self._options.server_wait_s:.0f} s "
                    "(synthesize.server_wait_s); what is done is saved, the same command goes on",
                    file=sys.stderr,
                )
                self._fail(SystemExit(EXIT_AGAIN))
                return
            self._pool.wake()

    async def _converse(self, prompt: Prompt, endpoint: Endpoint) -> None:
        """Answer one prompt, turn by turn, and write what becomes of it."""
        conversation, seat = Conversation(prompt), _Seat(self._pool, endpoint)
        greedy = self._options.temperature == 0 or is_heldout(prompt.id, self._config.data.heldout_share)
        try:
            while (question := conversation.question) is not None:
                answer = await self._answer(seat, question, greedy)
                if answer is None or answer.prompt_tokens + self._options.max_tokens > self._positions:
                    conversation.end(CONTEXT_FULL)
                else:
                    conversation.add(answer)
        except RequestError as trouble:
            self._outcomes.failed(prompt.id, Failure(trouble.reason, trouble.detail))
            if self._outcomes.num_made == 0 and self._outcomes.num_failed >= _HOPELESS:
                raise ValueError(
                    f"the first {_HOPELESS} conversations all failed, the last with {trouble.reason} ({trouble.detail})"
                ) from None
            return
        finally:
            seat.leave()
        if conversation.answers:
            self._outcomes.made([conversation], 0.0 if greedy else self._options.temperature)
        else:
            assert conversation.ended_by is not None
            failure = conversation.ended_by
            self._outcomes.failed(prompt.id, replace(failure, final=failure.final or greedy))

    async def _answer(self, seat: _Seat, question: list[Message], greedy: bool) -> Answer | None:
        """Ask until there is an answer, here or elsewhere; None where the context has no room for one.

        Raises:
            RequestError: tried often enough, or no use trying.
        """
        began, tries, pause_s = time.monotonic(), 0, _FIRST_PAUSE_S
        while True:
            endpoint = await seat.endpoint()
            try:
                return await endpoint.ask(self._body(endpoint, question, greedy))
            except RequestError as trouble:
                if trouble.context_full:
                    return None
                if trouble.refuses_us:
                    raise ValueError(_refused(endpoint, trouble)) from None
                tries += not trouble.pushed_back
                waited = time.monotonic() - began
                late = trouble.pushed_back and waited > self._options.server_wait_s
                if trouble.lasting or late or tries > self._options.retries:
                    raise
                seat.leave()
                if endpoint.suspect:
                    self._check(endpoint)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    def _body(self, endpoint: Endpoint, question: list[Message], greedy: bool) -> dict[str, Any]:
        """Give the request; a greedy one is free of whatever makes it less than greedy, the server's defaults too."""
        options = self._options
        request, extras = options.request, endpoint.extras
        if greedy:
            request = {name: value for name, value in request.items() if name not in (*_OF_SAMPLING, *_PENALTIES)}
            sampling = {"temperature": 0.0, "top_p": 1.0}
        else:
            sampling = {"temperature": options.temperature, "top_p": options.top_p}
            extras = {name: value for name, value in extras.items() if name not in _PENALTIES}
        kwargs = self._config.verifier.chat_template_kwargs
        template = {"chat_template_kwargs": kwargs} if kwargs else {}
        return {"messages": question, "max_tokens": options.max_tokens, **sampling, **template, **extras, **request}

    async def _open_endpoints(self) -> None:
        """Take into service the endpoints that answer, and go on looking for the others.

        Raises:
            ValueError: none answers, or one is not the verifier's.
        """
        troubles = {}
        for endpoint in self._pool.endpoints:
            try:
                await self._open(endpoint)
            except RequestError as trouble:
                troubles[endpoint.url] = f"{trouble.reason}, {trouble.detail}"
                self._check(endpoint)
        if len(troubles) == len(self._pool.endpoints):
            raise ValueError(
                f"synthesize.endpoints: no server answers ({'; '.join(map(': '.join, troubles.items()))}): "
                "start one that serves the verifier, or give none to run it in this process"
            )
        for url, why in troubles.items():
            print(f"synthesize: {url} does not answer ({why}); it is used as soon as it does", file=sys.stderr)

    def _check(self, endpoint: Endpoint) -> None:
        """Take an endpoint out of service until it answers again."""
        endpoint.up = False
        if (running := self._checks.get(endpoint.url)) is None or running.done():
            self._checks[endpoint.url] = asyncio.create_task(self._wait_for(endpoint))

    async def _wait_for(self, endpoint: Endpoint) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._error:
            try:
                await self._open(endpoint)
                return
            except RequestError:
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S)
            except ValueError as error:
                self._fail(error)

    async def _open(self, endpoint: Endpoint) -> None:
        """Make sure that an endpoint serves the verifier, learn what it takes, and put it into service.

        Raises:
            RequestError: it does not answer.
            ValueError: it serves another model, or renders the chat template to other tokens.
        """
        try:
            endpoint.model = self._model_name(endpoint, await endpoint.models())
            answer = await self._probe(endpoint)
        except RequestError as trouble:
            if trouble.lasting:
                raise ValueError(_refused(endpoint, trouble)) from None
            raise
        self._compare_tokens(endpoint, answer)
        endpoint.revive()
        self._pool.wake()

    def _model_name(self, endpoint: Endpoint, served: list[dict[str, Any]]) -> str:
        """Give the name under which an endpoint serves the verifier; where it lists none, it will say so itself."""
        wanted = self._options.model or self._config.verifier.path
        names = {str(model.get("id")): str(model.get("id")) for model in served}
        names |= {str(model["root"]): str(model["id"]) for model in served if model.get("root") and model.get("id")}
        if names and wanted not in names:
            option = "synthesize.model" if self._options.model else "verifier.path"
            raise ValueError(
                f"{endpoint.url} serves {', '.join(sorted({str(model.get('id')) for model in served}))} and not "
                f"{option}={wanted}: start it with the verifier, or set synthesize.model to the verifier's name there"
            )
        return names.get(wanted, wanted)

    async def _probe(self, endpoint: Endpoint) -> Answer:
        """Send a small request of each kind that will be sent, with as many of the extra fields as the server takes."""
        neutral, tokens = {"repetition_penalty": 1.0}, {"return_token_ids": True}
        for extras in ({**neutral, **tokens}, neutral, tokens, {}):
            endpoint.extras = extras
            try:
                for greedy in {True, self._options.temperature == 0}:
                    body = {**self._body(endpoint, _PROBE, greedy), "max_tokens": 1}
                    answer = await self._patiently(endpoint, body)
                return answer
            except RequestError as trouble:
                if not trouble.lasting or trouble.refuses_us or not extras:
                    raise
        raise AssertionError

    async def _patiently(self, endpoint: Endpoint, body: dict[str, Any]) -> Answer:
        for tries in range(self._options.retries + 1):
            try:
                return await endpoint.ask(body)
            except RequestError as trouble:
                if trouble.lasting or trouble.reason == "connection lost" or tries == self._options.retries:
                    raise
                await asyncio.sleep(max(trouble.pause_s, _TICK_S))
        raise AssertionError

    def _compare_tokens(self, endpoint: Endpoint, answer: Answer) -> None:
        """Refuse a server that reads other tokens than the verifier's own template gives."""
        ours, theirs = self._probe_tokens, answer.turn.prompt if answer.turn else None
        if answer.prompt_tokens != len(ours) or (theirs is not None and theirs != ours):
            raise ValueError(
                f"{endpoint.url} reads a chat as other tokens than verifier.path={self._config.verifier.path} "
                f"({theirs or answer.prompt_tokens} for {ours if theirs else len(ours)}): it serves another model, or "
                "has another chat template; both must be the same, or no loss mask is right"
            )


def _refused(endpoint: Endpoint, trouble: RequestError) -> str:
    key = ", its key is read from OPENAI_API_KEY" if trouble.refuses_us else ""
    return f"{endpoint.url} refuses our requests ({trouble.reason}: {trouble.detail}){key}"
