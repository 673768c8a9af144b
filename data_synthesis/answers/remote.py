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
from ..heldout import is_heldout
from ..prompts.rows import Prompt
from ..tokens.chat_template import Message, fit_content
from .answer_log import AnswerLog
from .conversation import CONTEXT_FULL, EMPTY_ANSWER, Answer, Conversation, Failure
from .endpoint import Endpoint, RequestError
from .pool import Pool, Slot
from .verify_endpoint import EndpointVerifier, request_body

_TICK_S = 0.1
_LOOK_S = 5.0  # between two looks for new servers
_HOPELESS = 50  # conversations that fail before any is made: nothing more is tried
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # between the tries of a request, doubling


def answer_by_servers(config: Config, prompts: Iterable[Prompt], log: AnswerLog) -> None:
    """Answer the prompts that have no conversation yet, as many at once as the servers take.

    They are those of `synthesize.endpoints`, and those that have written their addresses to `synthesize.servers` by
    now or do so later, as one does that was started again.

    Raises:
        ValueError: no server of `synthesize.endpoints` answers, or one serves something else than the verifier.
    """
    unanswered = (prompt for prompt in prompts if log.wants(prompt.id))
    first = next(unanswered, None)
    if first is None:
        return
    gc.freeze()  # the libraries are many objects, and none of them is ever to be collected
    grace = f"{config.synthesize.grace_s:.0f} s (synthesize.grace_s)"
    with deferred(lambda: f"{log.in_flight or 0} conversations in flight have {grace}") as signals:
        asyncio.run(_Regeneration(config, log, signals).run(itertools.chain([first], unanswered)))


def _addresses(folder: str | None) -> list[str]:
    """Return the addresses that healthy servers have written."""
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

    def __init__(self, config: Config, log: AnswerLog, signals: StopSignals) -> None:
        self._options, self._verifier = config.synthesize, config.verifier
        self._heldout_share = config.data.heldout_share
        self._log, self._signals = log, signals
        self._endpoint_verifier = EndpointVerifier(config.verifier, config.synthesize)
        self._pool = Pool(config.synthesize.concurrency)
        self._probes: list[asyncio.Task[None]] = []  # one a server
        self._opened = self._answered = False

    async def run(self, prompts: Iterable[Prompt]) -> None:
        """Answer the prompts; an error ends all at once."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                work = self._tasks.create_task(self._answer_all(prompts))
                await self._watch(work)
                for task in (work, *self._probes):
                    task.cancel()
        except BaseExceptionGroup as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            raise error from None
        finally:
            for endpoint in self._pool.endpoints:
                await endpoint.close()

    async def _watch(self, work: asyncio.Task[None]) -> None:
        """Look at the clock until all is answered, a signal's grace is over, or all servers stay away."""
        last_up = looked = time.monotonic()
        stopped_at: float | None = None
        while not work.done():
            await asyncio.wait([work], timeout=_TICK_S)
            now = time.monotonic()
            if self._signals.received:
                stopped_at = stopped_at or now
                self._pool.close()
                if not self._opened or now - stopped_at >= self._options.grace_s:
                    return
            if self._opened and now - looked > _LOOK_S:
                looked = now
                self._keep_open(self._add_new_servers())
            if not self._opened or any(endpoint.up for endpoint in self._pool.endpoints):
                last_up = now
            elif not work.done() and now - last_up > self._options.server_wait_s:
                print(
                    f"fledge: no server has answered for {self._options.server_wait_s:.0f} s "
                    "(synthesize.server_wait_s); what is done is saved, the same command goes on",
                    file=sys.stderr,
                )
                raise SystemExit(EXIT_AGAIN)
            self._pool.wake()

    async def _answer_all(self, prompts: Iterable[Prompt]) -> None:
        """Start a conversation whenever an endpoint has a free slot, and wait for all of them."""
        await self._open_endpoints()
        async with asyncio.TaskGroup() as conversations:
            for prompt in prompts:
                slot = await self._pool.begin()
                if slot is None:
                    return
                conversations.create_task(self._converse(prompt, slot))
                self._log.in_flight = self._pool.conversations

    def _add_new_servers(self) -> list[Endpoint]:
        """Return the endpoints of servers that have written their addresses since; they are asked by no proxy."""
        known = {endpoint.url for endpoint in self._pool.endpoints}
        urls = [url for url in _addresses(self._options.servers) if url not in known]
        new = [Endpoint(url, self._options, by_proxy=False) for url in urls]
        self._pool.endpoints += new
        _allow_open_files(self._pool.max_conversations)
        return new

    async def _open_endpoints(self) -> None:
        """Take into service the endpoints that answer, and go on looking for the others.

        Raises:
            ValueError: none answers, or one is not the verifier's.
        """
        self._pool.endpoints += [Endpoint(url, self._options) for url in self._options.endpoints]
        self._add_new_servers()
        endpoints = list(self._pool.endpoints)
        found = await asyncio.gather(*map(self._endpoint_verifier.open, endpoints), return_exceptions=True)
        for trouble in found:
            if trouble is not None and not isinstance(trouble, RequestError):
                raise trouble
        if all(found) and not self._options.servers:  # some may still come
            why = "; ".join(f"{endpoint.url}: {trouble}" for endpoint, trouble in zip(endpoints, found, strict=True))
            raise ValueError(
                f"synthesize.endpoints: no server answers ({why}): "
                "start one that serves the verifier, or give none to run it in this process"
            )
        self._keep_open(endpoints)
        self._opened = True

    def _keep_open(self, endpoints: list[Endpoint]) -> None:
        self._probes += [self._tasks.create_task(self._probe(endpoint)) for endpoint in endpoints]

    async def _probe(self, endpoint: Endpoint) -> None:
        """Probe an endpoint whenever it is out of service, until it answers again."""
        while True:
            await endpoint.lost.wait()
            pause_s = _FIRST_PAUSE_S
            while not endpoint.up:
                try:
                    await self._endpoint_verifier.open(endpoint)
                except (RequestError, ValueError) as trouble:  # ValueError: what answers there now is not the verifier
                    if pause_s == _FIRST_PAUSE_S:
                        print(f"synthesize: {endpoint.url} is left out until it answers: {trouble}", file=sys.stderr)
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, _MOST_PAUSE_S)
            if pause_s > _FIRST_PAUSE_S:
                print(f"synthesize: {endpoint.url} answers again", file=sys.stderr)
            self._pool.wake()

    async def _converse(self, prompt: Prompt, slot: Slot) -> None:
        """Answer one prompt, turn by turn, and write what becomes of it."""
        conversation = Conversation(prompt)
        greedy = self._options.temperature == 0 or is_heldout(prompt.id, self._heldout_share)
        try:
            while (question := conversation.question) is not None:
                answer = await self._answer(slot, question, greedy)
                if answer is None:
                    conversation.end(CONTEXT_FULL)
                else:
                    conversation.add(answer)
        except RequestError as trouble:
            of_request = trouble.lasting and not trouble.refuses_us  # another start would fail as this one
            failed = Failure(trouble.reason, trouble.detail, final=of_request)
            if not trouble.lasting:
                self._fail(prompt, failed)  # another start may do better
                return
            conversation.end(failed)
        finally:
            slot.end()
            self._log.in_flight = self._pool.conversations
        if conversation.answers:
            self._log.add([conversation], 0.0 if greedy else self._options.temperature)
            return
        failure = conversation.ended_by
        assert failure is not None
        self._fail(prompt, replace(failure, final=True) if greedy and failure is EMPTY_ANSWER else failure)

    def _fail(self, prompt: Prompt, failure: Failure) -> None:
        self._log.fail(prompt.id, failure)
        if not self._answered and self._log.num_failed >= _HOPELESS:
            raise ValueError(
                f"the first {_HOPELESS} conversations all failed, the last with {failure.reason} ({failure.detail})"
            )

    async def _answer(self, slot: Slot, question: list[Message], greedy: bool) -> Answer | None:
        """Ask until there is an answer, here or elsewhere; None if the context has no room for one.

        Raises:
            RequestError: tried often enough, or no use trying.
        """
        tries, pause_s, tokenizer = 0, _FIRST_PAUSE_S, self._endpoint_verifier.tokenizer
        messages = fit_content(tokenizer, question)  # engines do not all join text parts alike
        while True:
            endpoint = await slot.endpoint()
            try:
                answer = await endpoint.ask(request_body(endpoint, self._options, self._verifier, messages, greedy))
            except RequestError as trouble:
                if trouble.context_full:
                    return None
                tries += not trouble.pushed_back
                late = trouble.pushed_back and time.monotonic() - endpoint.answered_at > self._options.server_wait_s
                if (trouble.lasting and not trouble.refuses_us) or late or tries > self._options.retries:
                    raise
                slot.release(failed=True)
            else:
                self._answered = True
                return answer.split_reasoning(tokenizer)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)
