"""Questions answered by a running server that serves the verifier with a draft head.

A request is the tokens that evaluation in this process would give the verifier. A chat endpoint renders the template
itself, with a date and defaults of its own: nobody would know whether the same was measured.
"""

import asyncio
import sys
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from ...conf.runtime.artifact import Artifact, digest
from ...conf.runtime.journal import Journal
from ...conf.runtime.progress import Progress
from ...conf.runtime.signals import EXIT_AGAIN, StopSignals, deferred
from ...conf.schema import Config
from ...data_synthesis.answers.endpoint import Endpoint, RequestError
from ...data_synthesis.answers.verify_endpoint import refusal
from ..figures.records import RECORDS, TRAINED
from ..questions.question import Question
from ..questions.reader import QuestionReader, UnaskableError
from .engines import Completion, open_engine

_LOOK_EVERY_S, _TICK_S, _PUSHED_BACK_S = 5.0, 0.1, 1.0


def check_server(config: Config, questions: list[Question]) -> None:
    """Check that the server's answers to these questions can be measured, before anything is written."""
    pictured = next((question.id for question in questions if question.images), None)
    if pictured is not None:
        raise ValueError(
            f"evaluate.engine must be transformers for questions with images ({pictured}): a server is sent tokens"
        )
    client = _Client(config)
    client.run(client.check(questions))


def answer_by_server(config: Config, questions: list[Question], target: Artifact) -> None:
    """Answer those questions that the journal of `target` does not hold yet; its manifest then says who answers.

    Exits with a code that asks for another start if the server goes away.
    """
    journal = Journal(target.folder / RECORDS)
    left = [question for question in questions if question.id not in journal.done]
    if left:
        progress = Progress("evaluate", len(questions), "question", done=len(questions) - len(left))
        client = _Client(config)
        client.run(client.answer(left, target, journal, progress))
        progress.close()
    journal.close()


async def _until_signal(work: Coroutine[Any, Any, None], signals: StopSignals) -> None:
    task = asyncio.create_task(work)
    while not task.done() and not signals.received:
        await asyncio.wait([task], timeout=_TICK_S)
    if task.done():
        task.result()


class _Client:
    """Puts questions to a server."""

    def __init__(self, config: Config) -> None:
        self._config, self._options = config, config.evaluate
        assert self._options.endpoint is not None
        connections = replace(config.synthesize, concurrency=self._options.batch_size)
        self._endpoint = Endpoint(self._options.endpoint, connections)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something to its end, or until a signal: questions in flight are asked again by the next start."""
        with deferred("it ends now, what it has saved stays") as signals:
            try:
                asyncio.run(_until_signal(work, signals))
            except RequestError as trouble:
                if trouble.lasting:
                    raise ValueError(refusal(self._endpoint, trouble)) from None
                longer = "; raise synthesize.request_timeout_s if answers take longer" if trouble.busy else ""
                what = f"{self._endpoint.url} does not answer any more ({trouble}{longer})"
                print(f"fledge: {what}; what is done is saved, the same command goes on", file=sys.stderr)
                raise SystemExit(EXIT_AGAIN) from None

    async def check(self, questions: list[Question]) -> None:
        """Open the server, and see whether the prompts that are known before any answer have room."""
        async with self._opened():
            self._reader.check(questions)

    async def answer(self, questions: list[Question], target: Artifact, journal: Journal, progress: Progress) -> None:
        """Open the server and put the questions to it, evaluate.batch_size of them at a time."""
        waiting = iter(questions)

        async def one_after_the_other() -> None:
            for question in waiting:
                journal.append([await self._record(question)])
                progress.update()

        async with self._opened():
            self._write_engine(target)
            try:
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(self._options.batch_size):
                        tasks.create_task(one_after_the_other())
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    @asynccontextmanager
    async def _opened(self) -> AsyncIterator[None]:
        try:
            try:
                self._engine = await open_engine(self._config, self._endpoint)
            except RequestError as trouble:
                if trouble.lasting:
                    raise
                raise ValueError(
                    f"evaluate.endpoint: no server answers at {self._endpoint.url} ({trouble}): start one that serves "
                    "the verifier with the head"
                ) from None
            self._reader = QuestionReader(self._config, self._endpoint.max_context, self._endpoint.url)
            yield
        finally:
            await self._endpoint.close()

    def _write_engine(self, target: Artifact) -> None:
        """Put into the manifest who answers; an evaluation that another has begun is not gone on with."""
        served = {"engine": self._engine.name, "model": self._endpoint.model, "definition": self._engine.definition}
        begun = target.manifest.get("served", served)
        if begun != served:
            raise ValueError(
                f"{target.folder} was begun with {begun['engine']} serving {begun['model']}, and {self._endpoint.url} "
                f"is {served['engine']} serving {served['model']}: choose another name, or delete the folder"
            )
        target.save(served=served)

    async def _record(self, question: Question) -> dict[str, Any]:
        """Have the turns of a question answered; return its record."""
        answers: list[dict[str, Any]] = []
        for turn in range(len(question.turns)):
            try:
                prompt, max_tokens, _ = self._reader.read(question, [answer["text"] for answer in answers])
            except UnaskableError as error:
                return question.record(answers, f"turn {turn + 1}: {error}")
            seed = int(digest([self._options.seed, turn, question.id])[:8], 16)
            completion = await self._ask(prompt, max_tokens, seed)
            written = {"output_tokens": completion.output_tokens}
            drafted = {**asdict(completion.counts), **written, "seconds": completion.seconds}
            answer = {"text": completion.text, "prompt_tokens": len(prompt), **written}
            answers.append({**answer, "seconds_alone": None, "drafters": {TRAINED: drafted}})
        return question.record(answers)

    async def _ask(self, prompt: list[int], max_tokens: int, seed: int) -> Completion:
        """Ask, and again for as long as the server says that it has too much to do."""
        while True:
            try:
                return await self._ask_once(prompt, max_tokens, seed)
            except RequestError as trouble:
                if not trouble.pushed_back:
                    raise
                await asyncio.sleep(max(trouble.pause_s, _PUSHED_BACK_S))

    async def _ask_once(self, prompt: list[int], max_tokens: int, seed: int) -> Completion:
        """Ask, and look now and then whether the server is there: vLLM, told to stop, leaves requests hanging."""
        answer = asyncio.create_task(self._engine.ask(prompt, max_tokens, seed))
        try:
            while not (await asyncio.wait([answer], timeout=_LOOK_EVERY_S))[0]:
                try:
                    await self._endpoint.models()
                except RequestError as trouble:
                    if not trouble.busy:
                        raise
            return answer.result()
        finally:
            answer.cancel()
