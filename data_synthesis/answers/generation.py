"""Answers of a verifier in this process, many at a time: when one ends, the next begins in its place.

Whoever wants answers is a generator: it yields a `GenerationRequest` and is sent the answer. So a conversation asks
turn by turn. Each has a row of one static key-value cache: a context is read by itself, all but its last token, and
then all rows take steps of one token together. A sampled token is drawn by random numbers of its request: what else is
being answered changes an answer by no more than rounding, which in bfloat16 changes a word now and then.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice, takewhile
from operator import eq
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from ...models.verifier.cache import CachedVerifier, round_up
from ...models.verifier.model import Verifier
from ...models.verifier.sampling import draw, probabilities

_MULTIPLE = 16  # tokens that are read together, since CPUs prepare for every other number of them anew
_NUM_SORTED = 256  # of the likeliest tokens, for top_p
_SAMPLE = "The cache is checked on this text: it has to end with the logits that the model itself gives."


@dataclass(frozen=True)
class GenerationRequest:
    """A context to be answered."""

    context: list[int]
    max_tokens: int
    end_token_ids: Collection[int]
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    seed: int = 0  # of what is drawn


class Generated(NamedTuple):
    """An answer."""

    tokens: list[int]  # with the one that ends it
    ended: bool  # by itself


Task = Generator[GenerationRequest, Generated, None]


@dataclass
class _Row:
    """A row of the cache, and the task that it is for."""

    task: Task
    request: GenerationRequest
    answer: list[int] = field(default_factory=list)
    draws: list[float] = field(default_factory=list)  # uniform numbers, one for each token
    text: list[int] = field(default_factory=list)  # tokens in the cache
    num_read: int = 0  # of them, read as one context

    @property
    def read(self) -> list[int]:
        """Return the begin of the text, which was read as one context."""
        return self.text[: self.num_read]

    @property
    def last(self) -> int:
        """Return the last token, which is not in the cache yet."""
        return self.answer[-1] if self.answer else self.request.context[-1]


class Generation:
    """Answers what tasks ask for, `num_rows` of them at a time; in padded batches if no static cache holds the past."""

    def __init__(self, verifier: Verifier, num_rows: int) -> None:
        self._verifier = verifier
        self._rows: list[_Row | None] = [None] * num_rows
        config = verifier.model.config.get_text_config()
        sample = [token for token in verifier.tokenizer.encode(_SAMPLE) if token < config.vocab_size]
        try:
            self._cached = CachedVerifier(verifier, num_rows)
            if len(sample) > 2:
                self._cached.check(sample)
            self._is_static = self._cached.context >= config.max_position_embeddings
        except ValueError as error:
            self._is_static = False
            print(f"fledge: batches wait for their longest answer, since no static cache can be used: {error}")

    @torch.no_grad()
    def run(
        self,
        tasks: Iterator[Task],
        may_begin: Callable[[], bool] = lambda: True,
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        """Run tasks, which begin in their order.

        As soon as `may_begin` returns False no other begins; as soon as `may_go_on` does, those at work are dropped.
        """
        try:
            (self._run_static if self._is_static else self._run_batches)(tasks, may_begin, may_go_on)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the keys and values of {len(self._rows)} texts do not fit into memory beside the verifier: lower "
                f"synthesize.batch_size, and start the same command again ({str(error).splitlines()[0]})"
            ) from error

    def _run_static(self, tasks: Iterator[Task], may_begin: Callable[[], bool], may_go_on: Callable[[], bool]) -> None:
        """Run tasks by the static cache: the next begins in the place of one that ended."""
        while may_go_on():
            for place in range(len(self._rows)):
                while self._rows[place] is None and may_begin():
                    if (task := next(tasks, None)) is None:
                        break
                    self._begin(place, task)
            at_work = [place for place, row in enumerate(self._rows) if row is not None]
            if not at_work:
                return
            if 2 * len(at_work) <= len(self._rows):  # no other will begin
                self._cached.resize(self._cached.num_slots, at_work)
                self._rows = [self._rows[place] for place in at_work]
            self._step()

    def _begin(self, place: int, task: Task) -> None:
        """Read the first context of a task, if it has one."""
        if (request := next(task, None)) is not None:
            self._rows[place] = row = _Row(task, request)
            self._read(place, row)

    def _read(self, place: int, row: _Row) -> None:
        """Read a row's context, but for its last token and what the cache has of it already."""
        request, before, cached = row.request, row.text, self._cached
        row.answer, row.draws, row.text = [], _uniform_numbers(request), request.context[:-1]
        others = (place for place, r in enumerate(self._rows) if r and r is not row and r.read == row.text)
        known = sum(takewhile(bool, map(eq, before, row.text)))
        new = row.text[known:]
        # Of the padding nothing is seen, and what follows is written over it.
        new += [0] * min(-len(new) % _MULTIPLE, cached.context - len(row.text))
        if known + len(new) > cached.num_slots:
            cached.resize(known + len(new))
        row.num_read = min(row.num_read, known) if before else len(row.text)
        if not before and (other := next(others, None)) is not None:  # it was read as this one would be
            cached.copy(other, place, len(row.text))
        elif new:
            fed, length = (torch.tensor(x, device=self._verifier.device) for x in ([new], [known]))
            sequence = slice(place, place + 1)
            cached.forward(fed, length, known + len(new), sequence, is_prompt=not known, logits_to_keep=1)

    def _step(self) -> None:
        """Add a token to every row; begin the next answer of a task if it ends one."""
        device = self._verifier.device
        fed = torch.tensor([[row.last if row else 0] for row in self._rows], device=device)
        lengths = [len(row.text) if row else 0 for row in self._rows]
        num_read = round_up(max(lengths) + 1)
        if num_read > self._cached.num_slots or not self._cached.are_most(num_read):
            self._cached.resize(num_read)
        output = self._cached.forward(fed, torch.tensor(lengths, device=device), num_read)
        tokens = self._choose(output.logits[:, 0])
        for place, row in enumerate(self._rows):
            if row is None:
                continue
            row.text.append(row.last)
            row.answer.append(tokens[place])
            ended = tokens[place] in row.request.end_token_ids
            if not ended and len(row.answer) < row.request.max_tokens:
                continue
            try:
                row.request = row.task.send(Generated(row.answer, ended))
            except StopIteration:
                self._rows[place] = None
            else:
                self._read(place, row)

    def _choose(self, logits: Tensor) -> list[int]:
        """Return every row's next token, by logits [B, V]."""
        if logits.isnan().any():
            dtype = str(self._verifier.model.dtype).removeprefix("torch.")
            raise ValueError(f"verifier.dtype: the verifier's logits are not numbers in {dtype}: set float32")
        tokens = logits.argmax(-1)
        sampled = defaultdict[tuple[float, float], dict[int, float]](dict)  # by place the number that draws
        for place, row in enumerate(self._rows):
            if row is not None and row.request.temperature:
                sampled[row.request.temperature, row.request.top_p][place] = row.draws[len(row.answer)]
        for (temperature, top_p), numbers in sampled.items():
            places = list(numbers)
            draws = torch.tensor(list(numbers.values()), dtype=torch.float64, device=logits.device)
            p = probabilities(logits[places], temperature, top_p, num_sorted=_NUM_SORTED)
            tokens[places] = draw(p, draws)
        return list(tokens.tolist())

    def _run_batches(self, tasks: Iterator[Task], may_begin: Callable[[], bool], may_go_on: Callable[[], bool]) -> None:
        """Run tasks by transformers' own generation, as many as there are rows until all are at their ends."""
        while may_begin() and (batch := list(islice(tasks, len(self._rows)))):
            at_work = [(task, request) for task in batch if (request := next(task, None)) is not None]
            while at_work:
                kinds = defaultdict[tuple[object, ...], list[tuple[Task, GenerationRequest]]](list)
                for task, request in at_work:
                    kinds[request.max_tokens, *request.end_token_ids, request.temperature, request.top_p].append(
                        (task, request)
                    )
                at_work = []
                for alike in kinds.values():
                    answers = self._answer_batch([request for _, request in alike], may_go_on)
                    if not may_go_on():
                        return
                    for (task, _), answer in zip(alike, answers, strict=True):
                        with suppress(StopIteration):
                            at_work.append((task, task.send(answer)))

    def _answer_batch(self, requests: list[GenerationRequest], may_go_on: Callable[[], bool]) -> list[Generated]:
        """Answer requests that differ in their contexts alone."""

        def over(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), not may_go_on(), device=input_ids.device)

        model, first, device = self._verifier.model, requests[0], self._verifier.device
        ends, width = list(first.end_token_ids), max(len(request.context) for request in requests)
        texts = [[0] * (width - len(request.context)) + request.context for request in requests]
        mask = [[0] * (width - len(request.context)) + [1] * len(request.context) for request in requests]
        sampling = {"temperature": first.temperature, "top_p": first.top_p, "top_k": 0}
        # A configuration of our own: the verifier's may carry penalties, and greedy must be greedy.
        model.generation_config = GenerationConfig(
            max_new_tokens=first.max_tokens,
            do_sample=first.temperature > 0,
            **(sampling if first.temperature else {}),
            eos_token_id=ends,
            pad_token_id=0,
        )
        torch.manual_seed(first.seed)
        output = model.generate(
            torch.tensor(texts, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=model.generation_config,
            stopping_criteria=StoppingCriteriaList([over]),
        )
        answers = []
        for row in output[:, width:].tolist():
            stop = next((place for place, token in enumerate(row) if token in ends), None)
            answers.append(Generated(row if stop is None else row[: stop + 1], stop is not None))
        return answers


def _uniform_numbers(request: GenerationRequest) -> list[float]:
    if not request.temperature:
        return []
    generator = torch.Generator().manual_seed(request.seed)
    return list(torch.rand(request.max_tokens, generator=generator, dtype=torch.float64).tolist())
