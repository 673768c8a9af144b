"""The verifier answers through OpenAI-compatible servers: vLLM, SGLang, TensorRT-LLM and whatever speaks as they do."""

import asyncio
import gc
import itertools
import random
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from ...conf.runtime.artifact import seed_of
from ...conf.runtime.signals import EXIT_AGAIN, StopSignals, deferred
from ...conf.schema import Config
from ..heldout import is_heldout
from ..prompts.rows import Prompt
from ..tokens.chat_template import Message, fit_content
from ..tokens.user_turn import find_user_turn
from .answer_log import AnswerLog
from .conversation import CONTEXT_FULL, EMPTY_ANSWER, Answer, Conversation, Failure
from .endpoint import Endpoint, Pool, RequestError, Slot
from .user_turns import Drawn, FurtherTurns, RawPrompts
from .verify_endpoint import EndpointVerifier, request_body

T = TypeVar("T")
A = TypeVar("A")
_TICK_S = 0.1
_MOST_FILES = 1 << 16  # open at a time
_LOOK_S = 5.0  # between two looks for new servers
_HOPELESS = 50  # conversations that fail before any is made: nothing more is tried
_FIRST_PAUSE_S, _MOST_PAUSE_S = 0.5, 30.0  # between the tries of a request, doubling


def answer_by_servers(config: Config, prompts: Iterable[Prompt], log: AnswerLog) -> None:
    """Answer the prompts that have no conversation yet, as many at once as the servers take.

    They are those of `synthesize.endpoints`, and those that have written their addresses to `synthesize.servers` by
    now or do so later, as one does that was started again. Raises ValueError if no server of `synthesize.endpoints`
    answers, or one serves something else than the verifier.
    """
    ask_servers(_Answers(config, log), (prompt for prompt in prompts if log.wants(prompt.id)))


def ask_servers(work: "ServerWork[T]", items: Iterator[T]) -> None:
    """Return once every item is worked on; a signal lets what is in flight end within `synthesize.grace_s`."""
    first = next(items, None)
    if first is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:  # connections are open files
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    gc.freeze()  # the libraries are many objects, and none of them is ever to be collected
    grace = f"{work.options.grace_s:.0f} s (synthesize.grace_s)"
    with deferred(lambda: f"{work.in_flight} {work.unit} in flight have {grace}") as signals:
        asyncio.run(work.run(itertools.chain([first], items), signals))


class ServerWork(ABC, Generic[T]):
    """What servers are asked for in one start: items, each worked on by `_work` in a slot of an endpoint."""

    unit = "conversations"

    def __init__(self, config: Config) -> None:
        self.options, self._verifier = config.synthesize, config.verifier
        self._endpoint_verifier = EndpointVerifier(config.verifier, config.synthesize, config.data.sources)
        self._pool = Pool(config.synthesize.concurrency)
        self._servers: list[asyncio.Task[None]] = []  # one task each
        self._opened = asyncio.Event()  # every server known at the start was tried, and answering begins
        self._answered = False

    @property
    def in_flight(self) -> int:
        """Return the number of items that are being worked on."""
        return self._pool.conversations

    @abstractmethod
    async def _work(self, item: T, slot: Slot) -> None:
        """Work on an item, and give its slot back."""

    async def run(self, items: Iterable[T], signals: StopSignals) -> None:
        """Work on all items; an error ends all at once."""
        self._signals = signals
        try:
            async with asyncio.TaskGroup() as self._tasks:
                work = self._tasks.create_task(self._work_on_all(items))
                await self._watch(work)
                for task in (work, *self._servers):
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
                self._pool.closed = True
                if not self._opened.is_set() or now - stopped_at >= self.options.grace_s:
                    return
            if self._opened.is_set() and now - looked > _LOOK_S:
                looked = now
                self._add(self._new_servers())
            if not self._opened.is_set() or any(endpoint.up for endpoint in self._pool.endpoints):
                last_up = now
            elif not work.done() and now - last_up > self.options.server_wait_s:
                print(
                    f"fledge: no server has answered for {self.options.server_wait_s:.0f} s "
                    "(synthesize.server_wait_s); what is done is saved, the same command goes on",
                    file=sys.stderr,
                )
                raise SystemExit(EXIT_AGAIN)
            self._pool.wake()

    async def _work_on_all(self, items: Iterable[T]) -> None:
        """Start an item whenever an endpoint has a free slot, and wait for all of them."""
        self._add([Endpoint(url, self.options) for url in self.options.endpoints])
        self._add(self._new_servers())
        endpoints = list(self._pool.endpoints)
        await asyncio.gather(*(endpoint.tried.wait() for endpoint in endpoints))
        if not self.options.servers and not any(endpoint.up for endpoint in endpoints):  # of those some may still come
            why = "; ".join(f"{endpoint.url}: {endpoint.trouble}" for endpoint in endpoints)
            raise ValueError(
                f"synthesize.endpoints: no server answers ({why}): "
                "start one that serves the verifier, or give none to run it in this process"
            )
        self._opened.set()
        async with asyncio.TaskGroup() as tasks:
            for item in items:
                if (endpoint := await self._pool.take()) is None:
                    return
                tasks.create_task(self._work(item, Slot(self._pool, endpoint)))

    def _new_servers(self) -> list[Endpoint]:
        """Return those of the servers that have written their addresses since; they are asked by no proxy."""
        known, urls = {"", *(endpoint.url for endpoint in self._pool.endpoints)}, []
        for file in sorted(Path(self.options.servers).glob("*.healthy")) if self.options.servers else ():
            with suppress(FileNotFoundError):  # it has just ended
                urls.append(file.read_text().strip())
        return [Endpoint(url, self.options, by_proxy=False) for url in urls if url not in known]

    def _add(self, endpoints: list[Endpoint]) -> None:
        self._pool.endpoints += endpoints
        self._servers += [self._tasks.create_task(self._keep_open(endpoint)) for endpoint in endpoints]

    async def _keep_open(self, endpoint: Endpoint) -> None:
        """Open an endpoint, and again whenever it is out of service; at the start another model there is an error."""
        pause_s = 0.0
        while True:
            try:
                await self._endpoint_verifier.open(endpoint)
            except (RequestError, ValueError) as trouble:  # ValueError: what answers there is not the verifier
                if isinstance(trouble, ValueError) and not self._opened.is_set():
                    raise
                endpoint.trouble = trouble
                endpoint.tried.set()
                await self._opened.wait()
                if not pause_s:
                    print(f"synthesize: {endpoint.url} is left out until it answers: {trouble}", file=sys.stderr)
                pause_s = min(2 * pause_s, _MOST_PAUSE_S) or _FIRST_PAUSE_S
                await asyncio.sleep(pause_s)
                continue
            endpoint.tried.set()
            if pause_s:
                print(f"synthesize: {endpoint.url} answers again", file=sys.stderr)
            pause_s = 0.0
            self._pool.wake()
            await endpoint.lost.wait()

    async def _ask(self, slot: Slot, ask: Callable[[Endpoint], Awaitable[A]]) -> A:
        """Ask until there is an answer, here or elsewhere; raise RequestError if tried often enough, or in vain."""
        tries, pause_s = 0, _FIRST_PAUSE_S
        while True:
            endpoint = await slot.endpoint()
            try:
                answer = await ask(endpoint)
            except RequestError as trouble:
                tries += not trouble.pushed_back
                late = trouble.pushed_back and time.monotonic() - endpoint.answered_at > self.options.server_wait_s
                if trouble.context_full or trouble.final or late or tries > self.options.retries:
                    raise
                slot.release(failed=True)
            else:
                self._answered = True
                return answer
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _MOST_PAUSE_S)


class _Answers(ServerWork[Prompt]):
    """Conversations."""

    def __init__(self, config: Config, log: AnswerLog) -> None:
        super().__init__(config)
        self._heldout_share, self._log = config.data.heldout_share, log
        self._further = FurtherTurns(config.data)
        self._raw = RawPrompts(config.verifier, config.synthesize, self._endpoint_verifier.tokenizer)

    async def _work(self, prompt: Prompt, slot: Slot) -> None:
        """Answer one prompt, turn by turn, and write what becomes of it."""
        self._log.in_flight = self.in_flight
        conversation, passing = self._further.begin(prompt), False
        greedy = self.options.temperature == 0 or is_heldout(prompt.id, self._heldout_share)
        try:
            while (question := conversation.question) or conversation.wants_turn:
                if question:
                    conversation.add(await self._answer(slot, question, greedy))
                else:
                    self._further.add(conversation, await self._write_turn(slot, conversation))
        except RequestError as trouble:
            passing = trouble.refuses_us or not trouble.lasting  # another start may do better
            refused = Failure(trouble.reason, trouble.detail, final=trouble.final)
            conversation.ended_by = CONTEXT_FULL if trouble.context_full else refused
        finally:
            slot.end()
            self._log.in_flight = self.in_flight
        if conversation.answers and not passing:
            self._log.add([conversation], 0.0 if greedy else self.options.temperature)
            return
        failure = conversation.ended_by
        assert failure is not None
        self._log.fail(prompt.id, replace(failure, final=True) if greedy and failure is EMPTY_ANSWER else failure)
        if not self._answered and self._log.num_failed >= _HOPELESS:
            raise ValueError(
                f"the first {_HOPELESS} conversations all failed, the last with {failure.reason} ({failure.detail})"
            )

    async def _write_turn(self, slot: Slot, conversation: Conversation) -> Drawn | None:
        prompt, raw = conversation.prompt, self._raw
        try:
            turn = await asyncio.to_thread(find_user_turn, raw.tokenizer, conversation.history, raw.end_token_ids)
        except ValueError:  # this history has none
            return None
        seed = seed_of(self.options.seed, prompt.id, len(conversation.answers))
        return await self._ask(slot, partial(raw.draw_further, turn, self._further.sources[prompt.source], seed))

    async def _answer(self, slot: Slot, question: list[Message], greedy: bool) -> Answer:
        tokenizer = self._endpoint_verifier.tokenizer
        messages = fit_content(tokenizer, question)  # engines do not all join text parts alike

        def ask(endpoint: Endpoint) -> Awaitable[Answer]:
            return endpoint.ask(request_body(endpoint, self.options, self._verifier, messages, greedy))

        return (await self._ask(slot, ask)).split_reasoning(tokenizer)
