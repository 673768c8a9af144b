"""The verifier answers through OpenAI-compatible servers: vLLM, SGLang, TensorRT-LLM and whatever speaks as they do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import random
import resource
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ...conf.runtime.signals import EXIT_AGAIN, StopSignals, deferred
from ...conf.schema import Config
from ..conversations import CONTEXT_FULL, EMPTY_ANSWER, Answer, Conversation, Failure
from ..heldout import is_heldout
from ..prompts.rows import Prompt
from ..tokens.chat_template import Message, fit_content
from .answer_log import Outcomes
from .endpoint import Endpoint, RequestError
from .pool import Pool, Seat
from .verify_endpoint import Handshake, request_body

_TICK_S = 0.1
_LOOK_S = 5.0  # between two looks for new servers
_HOPELESS = 50  # conversations that fail before any is made: nothing more is tried
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # between the tries of a request, doubling


def answer_by_servers(config: Config, prompts: Iterable[Prompt], outcomes: Outcomes) -> None:
    """Answer the prompts that are wanted, as many at once as the servers take.

    They are those of `synthesize.endpoints`, and those that have written their addresses to `synthesize.servers` by
    now or do so later, as one does that was started again.

    Raises:
        ValueError: no server of `synthesize.endpoints` answers, or one serves something else than the verifier.
    """
    wanted = (prompt for prompt in prompts if outcomes.wants(prompt.id))
    first = next(wanted, None)
    if first is None:
        return
    gc.freeze()  # the libraries are many objects, and none of them is ever to be collected
    grace = f"{config.synthesize.grace_s:.0f} s (synthesize.grace_s)"
    with deferred(lambda: f"{outcomes.in_flight or 0} conversations in flight have {grace}") as signals:
        asyncio.run(_Regeneration(config, outcomes, signals).run(itertools.chain([first], wanted)))


def _addresses(folder: str | None) -> list[str]:
    """Give what the servers have written that are healthy by now."""
    found = []
    for file in sorted(Path(folder).glob("*.healthy")) if folder else ():
        with contextlib.suppress(FileNotFoundError):  # it has just ended
            found.append(file.read_text().strip())
    return [url for url in found if url]


def _allow_open_files(connections: int) -> None:
    """Raise the limit of open files to what the connections need, as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + connections
    if soft != resource.RLIM_INFINITY and soft < needed:
        limit = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))


class _Regeneration:
    """One start of the stage against servers."""

    def __init__(self, config: Config, outcomes: Outcomes, signals: StopSignals) -> None:
        self._config, self._options = config, config.synthesize
        self._outcomes, self._signals = outcomes, signals
        self._handshake = Handshake(config)
        self._rows: set[asyncio.Task[None]] = set()
        self._checks: dict[str, asyncio.Task[None]] = {}
        self._error: BaseException | None = None  # that ends the stage
        self._answered = False

    async def run(self, prompts: Iterable[Prompt]) -> None:
        self._pool = Pool([Endpoint(url, self._options) for url in self._options.endpoints])
        self._take_new_servers()
        self._changed = asyncio.Event()  # a conversation has ended, or no new one is wanted
        opening = asyncio.create_task(self._open_endpoints())
        others = [opening]
        try:
            while not opening.done() and not self._signals.received:
                await asyncio.wait([opening], timeout=_TICK_S)
            if opening.done():
                opening.result()
                others.append(asyncio.create_task(self._watch()))
                await self._feed(prompts)
                await self._finish()
        finally:
            tasks = [*others, *self._checks.values(), *self._rows]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for endpoint in self._pool.endpoints:
                await endpoint.close()
        if self._error:
            raise self._error

    @property
    def _most(self) -> int:
        """Conversations at once."""
        return self._options.concurrency * len(self._pool.endpoints)

    def _take_new_servers(self) -> list[Endpoint]:
        """Add the servers that have written their addresses since, which are asked by no proxy, and give them."""
        known = {endpoint.url for endpoint in self._pool.endpoints}
        urls = [url for url in _addresses(self._options.servers) if url not in known]
        new = [Endpoint(url, self._options, by_proxy=False) for url in urls]
        self._pool.endpoints += new
        _allow_open_files(self._most)
        return new

    async def _feed(self, prompts: Iterable[Prompt]) -> None:
        """Start a conversation whenever an endpoint has a place free."""
        for prompt in prompts:
            while (
                len(self._rows) >= self._most and not self._pool.closed
            ):  # some are between two tries, without a place
                self._changed.clear()
                await self._changed.wait()
            endpoint = await self._pool.take()
            if endpoint is None:
                return
            row = asyncio.create_task(self._converse(prompt, endpoint))
            self._rows.add(row)
            row.add_done_callback(self._row_ended)
            self._outcomes.in_flight = len(self._rows)

    def _row_ended(self, row: asyncio.Task[None]) -> None:
        self._rows.discard(row)
        self._outcomes.in_flight = len(self._rows)
        self._changed.set()
        if not row.cancelled() and (error := row.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._close()

    def _close(self) -> None:
        """Begin no new conversation."""
        self._pool.close()
        self._changed.set()

    async def _finish(self) -> None:
        """Wait for what is in flight: to its end, for the grace after a signal, not at all after an error."""
        stopped_at: float | None = None
        while self._rows and not self._error:
            if self._signals.received and stopped_at is None:
                stopped_at = time.monotonic()
            if stopped_at is not None and time.monotonic() - stopped_at >= self._options.grace_s:
                return
            await asyncio.wait(self._rows, timeout=_TICK_S)

    async def _watch(self) -> None:
        """Look at the clock: signals, pauses that are over, servers that stay away."""
        last_up = looked = time.monotonic()
        while True:
            await asyncio.sleep(_TICK_S)
            if self._signals.received:
                self._close()
            if time.monotonic() - looked > _LOOK_S:
                looked = time.monotonic()
                for endpoint in self._take_new_servers():
                    self._check(endpoint)
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
        conversation, seat = Conversation(prompt), Seat(self._pool, endpoint)
        greedy = self._options.temperature == 0 or is_heldout(prompt.id, self._config.data.heldout_share)
        try:
            while (question := conversation.question) is not None:
                answer = await self._answer(seat, question, greedy)
                if answer is None:
                    conversation.end(CONTEXT_FULL)
                else:
                    conversation.add(answer)
        except RequestError as trouble:
            of_request = trouble.lasting and not trouble.refuses_us  # another start would be told the same
            failed = Failure(trouble.reason, trouble.detail, final=of_request)
            if not trouble.lasting:
                self._failed(prompt, failed)  # another start may do better
                return
            conversation.end(failed)
        finally:
            seat.leave()
        if conversation.answers:
            self._outcomes.made([conversation], 0.0 if greedy else self._options.temperature)
            return
        failure = conversation.ended_by
        assert failure is not None
        self._failed(prompt, replace(failure, final=True) if greedy and failure is EMPTY_ANSWER else failure)

    def _failed(self, prompt: Prompt, failure: Failure) -> None:
        self._outcomes.failed(prompt.id, failure)
        if not self._answered and self._outcomes.num_failed >= _HOPELESS:
            raise ValueError(
                f"the first {_HOPELESS} conversations all failed, the last with {failure.reason} ({failure.detail})"
            )

    async def _answer(self, seat: Seat, question: list[Message], greedy: bool) -> Answer | None:
        """Ask until there is an answer, here or elsewhere; None where the context has no room for one.

        Raises:
            RequestError: tried often enough, or no use trying.
        """
        tries, pause_s, tokenizer = 0, _FIRST_PAUSE_S, self._handshake.tokenizer
        asked = fit_content(tokenizer, question)  # engines do not all join text parts alike
        while True:
            endpoint = await seat.endpoint()
            try:
                answer = await endpoint.ask(request_body(self._config, endpoint, asked, greedy))
            except RequestError as trouble:
                if trouble.context_full:
                    return None
                tries += not trouble.pushed_back
                late = trouble.pushed_back and time.monotonic() - endpoint.answered_at > self._options.server_wait_s
                if (trouble.lasting and not trouble.refuses_us) or late or tries > self._options.retries:
                    raise
                seat.leave(failed=True)
                if endpoint.suspect:
                    self._check(endpoint)
            else:
                self._answered = True
                return answer.told_apart(tokenizer)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)

    async def _open_endpoints(self) -> None:
        """Take into service the endpoints that answer, and go on looking for the others.

        Raises:
            ValueError: none answers, or one is not the verifier's.
        """
        endpoints = self._pool.endpoints
        found = await asyncio.gather(*map(self._handshake.open, endpoints), return_exceptions=True)
        troubles = dict(zip(endpoints, found, strict=True))
        for trouble in found:
            if trouble is not None and not isinstance(trouble, RequestError):
                raise trouble
        if all(found) and not self._options.servers:  # some may still come
            why = "; ".join(f"{endpoint.url}: {trouble}" for endpoint, trouble in troubles.items())
            raise ValueError(
                f"synthesize.endpoints: no server answers ({why}): "
                "start one that serves the verifier, or give none to run it in this process"
            )
        for endpoint, trouble in troubles.items():
            if trouble:
                self._check(endpoint)

    def _check(self, endpoint: Endpoint) -> None:
        """Take an endpoint out of service until it answers again."""
        endpoint.up = False
        if (running := self._checks.get(endpoint.url)) is None or running.done():
            self._checks[endpoint.url] = asyncio.create_task(self._wait_for(endpoint))

    async def _wait_for(self, endpoint: Endpoint) -> None:
        pause_s, told = _FIRST_PAUSE_S, False
        while True:
            try:
                await self._handshake.open(endpoint)
            except (RequestError, ValueError) as trouble:  # ValueError: what answers there now is not the verifier
                if not told:
                    print(f"synthesize: {endpoint.url} is left out until it answers: {trouble}", file=sys.stderr)
                told = True
            else:
                if told:
                    print(f"synthesize: {endpoint.url} answers again", file=sys.stderr)
                self._pool.wake()
                return
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
