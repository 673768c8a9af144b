"""Answers of a verifier in this process, many at a time: when one ends, the next begins in its place.

Whoever wants answers is a generator: it yields a `GenerationRequest` and is sent the answer. So a conversation asks
turn by turn. Each has a row of one static key-value cache: a context is read by itself, all but its last token, and
then all rows take steps of one token together. A sampled token is drawn by random numbers of its request: what else is
being answered changes an answer by no more than rounding.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass, field
from itertools import takewhile
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


def _yes() -> bool:
    return True


class Generation:
    """Answers what tasks ask for, `num_rows` of them at a time; one at a time if no static cache holds the past."""

    def __init__(self, verifier: Verifier, num_rows: int) -> None:
        self._verifier = verifier
        self._rows: list[_Row | None] = [None] * num_rows
        self._cached: CachedVerifier | None = None
        vocab_size = verifier.model.config.get_text_config().vocab_size
        sample = [token for token in verifier.tokenizer.encode(_SAMPLE) if token < vocab_size]
        try:
            self._cached = CachedVerifier(verifier, num_rows)
            if len(sample) > 2:
                self._cached.check(sample)
        except ValueError:
            self._cached = None
            name = type(verifier.model).__name__
            print(f"fledge: no static cache holds the past of {name}: it answers one at a time", file=sys.stderr)

    @torch.no_grad()
    def run(
        self, tasks: Iterator[Task], may_begin: Callable[[], bool] = _yes, may_go_on: Callable[[], bool] = _yes
    ) -> None:
        """Run tasks, which begin in their order.

        As soon as `may_begin` returns False no other begins; as soon as `may_go_on` does, those at work are dropped.
        """
        if self._cached is None:
            for one in tasks:
                if not may_begin() or not self._run_alone(one, may_go_on):
                    return
            return
        while may_go_on():
            for place in range(len(self._rows)):
                while self._rows[place] is None and may_begin():
                    if (task := next(tasks, None)) is None:
                        break
                    self._begin(self._cached, place, task)
            at_work = [place for place, row in enumerate(self._rows) if row is not None]
            if not at_work:
                return
            if 2 * len(at_work) <= len(self._rows):  # no other will begin
                self._cached.resize(self._cached.num_slots, at_work)
                self._rows = [self._rows[place] for place in at_work]
            self._step(self._cached)

    def _begin(self, cached: CachedVerifier, place: int, task: Task) -> None:
        """Read the first context of a task, if it has one."""
        if (request := next(task, None)) is not None:
            self._rows[place] = row = _Row(task, request)
            self._read(cached, place, row)

    def _read(self, cached: CachedVerifier, place: int, row: _Row) -> None:
        """Read a row's context, but for its last token and what the cache has of it already."""
        request, before = row.request, row.text
        row.answer, row.draws, row.text = [], _uniform_numbers(request), request.context[:-1]
        num_slots = len(request.context) + max(_MULTIPLE, request.max_tokens)
        if num_slots > cached.num_slots:
            cached.resize(num_slots, list(range(len(self._rows))))
        others = (place for place, r in enumerate(self._rows) if r and r is not row and r.read == row.text)
        known = sum(takewhile(bool, map(eq, before, row.text)))
        row.num_read = min(row.num_read, known) if before else len(row.text)
        if not before and (other := next(others, None)) is not None:  # it was read as this one would be
            cached.copy(other, place, len(row.text))
        elif new := row.text[known:]:
            new += [0] * (-len(new) % _MULTIPLE)  # of which nothing is seen, and which the next step writes over
            fed, length = (torch.tensor(x, device=self._verifier.device) for x in ([new], [known]))
            sequence = slice(place, place + 1)
            cached.forward(fed, length, known + len(new), sequence, is_prompt=not known, logits_to_keep=1)

    def _step(self, cached: CachedVerifier) -> None:
        """Add a token to every row; begin the next answer of a task if it ends one."""
        device = self._verifier.device
        fed = torch.tensor([[row.last if row else 0] for row in self._rows], device=device)
        lengths = [len(row.text) if row else 0 for row in self._rows]
        output = cached.forward(fed, torch.tensor(lengths, device=device), round_up(max(lengths) + 1))
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
                self._read(cached, place, row)

    def _choose(self, logits: Tensor) -> list[int]:
        """Return every row's next token, by logits [B, V]."""
        tokens = logits.argmax(-1)
        sampled = defaultdict[tuple[float, float], list[int]](list)
        for place, row in enumerate(self._rows):
            if row is not None and row.request.temperature:
                sampled[row.request.temperature, row.request.top_p].append(place)
        for (temperature, top_p), places in sampled.items():
            rows = [row for place in places if (row := self._rows[place])]
            draws = torch.tensor(
                [row.draws[len(row.answer)] for row in rows], dtype=torch.float64, device=logits.device
            )
            tokens[places] = draw(probabilities(logits[places], temperature, top_p, num_sorted=_NUM_SORTED), draws)
        return list(map(int, tokens.tolist()))

    def _run_alone(self, task: Task, may_go_on: Callable[[], bool]) -> bool:
        """Run a task by transformers' own generation; return whether it has come to its end."""

        def over(input_ids: Tensor, _scores: Any, **_: Any) -> Tensor:
            return torch.full((len(input_ids),), not may_go_on(), device=input_ids.device)

        request = next(task, None)
        while request is not None:
            ends = list(request.end_token_ids)
            sampling = {"temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
            # A configuration of our own: the verifier's may carry penalties, and greedy must be greedy.
            options = GenerationConfig(
                max_new_tokens=request.max_tokens,
                do_sample=request.temperature > 0,
                **(sampling if request.temperature else {}),
                eos_token_id=ends,
                pad_token_id=ends[0],
            )
            model = self._verifier.model
            model.generation_config = options
            torch.manual_seed(request.seed)
            context = torch.tensor([request.context], device=self._verifier.device)
            stop = StoppingCriteriaList([over])
            output = model.generate(
                context, attention_mask=torch.ones_like(context), generation_config=options, stopping_criteria=stop
            )
            if not may_go_on():
                return False
            answer = output[0, context.shape[1] :].tolist()
            try:
                request = task.send(Generated(answer, answer[-1] in ends))
            except StopIteration:
                return True
        return True


def _uniform_numbers(request: GenerationRequest) -> list[float]:
    if not request.temperature:
        return []
    generator = torch.Generator().manual_seed(request.seed)
    return list(torch.rand(request.max_tokens, generator=generator, dtype=torch.float64).tolist())
