"""Prompts that the verifier writes itself: it goes on after its template's user header (Magpie, arXiv:2406.08464)."""

import sys
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from ...conf.runtime.artifact import artifact, file_digest, seed_of, write_atomic
from ...conf.runtime.journal import Journal, json_line, read_journal
from ...conf.runtime.progress import Progress
from ...conf.runtime.signals import EXIT_AGAIN, deferred
from ...conf.schema import SELF, Config, SourceConfig
from ...models.verifier.model import free_memory
from ...models.verifier.weights import verifier_identity
from ..prompts.near_duplicates import NearDuplicates, fingerprint
from ..prompts.prepare import load_questions, prompt_settings, refusal, shares_of
from ..prompts.rows import Prompt
from ..prompts.sources import SELF_FILE, self_folder, source_name
from ..tokens.user_turn import find_user_turn
from .endpoint import RequestError, Slot
from .generation import Generation, Task
from .local import Grace, draw_turn, load_here
from .remote import ServerWork, ask_servers
from .user_turns import Drawn, RawPrompts, read_text

FILE = "draws.jsonl"
_SYNC_EVERY_S = 5.0
_WINDOW, _LEAST = 1000, 10  # of so many draws so many must be kept, or no more are made
_DRAW = ("temperature", "top_p", "max_tokens")  # options of a source that change what is drawn


def write_self_prompts(config: Config) -> None:
    """Write runs/<name>/self_prompts/<source>/ for each source `self` that is not complete; one process writes it.

    Every user turn that the verifier writes is a line of draws.jsonl; those that are kept, as many as are asked for,
    are written to prompts.jsonl in the order of their numbers. A kill loses the draws that were being made. Raises
    ValueError if the template has no user header that can be found, or no draw is kept.
    """
    for source, limit in zip(config.data.sources, shares_of(config.data), strict=True):
        if source.path == SELF:
            assert limit is not None  # the schema requires it
            _write(config, source, max(1, limit))


def _write(config: Config, source: SourceConfig, limit: int) -> None:
    options, folder = config.synthesize, self_folder(config, source)
    here = {"verifier_dtype": config.verifier.dtype.value}
    settings = {
        "verifier": verifier_identity(config.verifier),
        "seed": config.data.seed,
        **{name: value for name, value in asdict(source).items() if name in _DRAW},
        **({"request": options.request} if options.by_servers else here),
    }
    with artifact(folder, "self_prompts", settings, config.overwrite, wait=True) as target:
        path = folder / SELF_FILE
        made = target.manifest.get("selection")
        others = prompt_settings(replace(config.data, sources=[]), made)
        selection = {**others, "limit": limit, "min_ascii": source.min_ascii}
        done = target.complete and made == selection and path.is_file()
        if done and file_digest(path) == target.manifest["content"]:
            print(f"self prompts: {folder} is complete")
            return
        target.save(complete=False)
        with closing(Draws(config, source, folder, limit)) as draws:
            (_draw_by_servers if options.by_servers else _draw_here)(config, source, draws)
            reasons = ", ".join(f"{number} {reason}" for reason, number in draws.refused.most_common())
            left_out = f"of {len(draws.kept) + draws.refused.total()} drawn {reasons or 'none'} left out"
            if not draws.kept:
                raise ValueError(f"data.sources self: the verifier writes no prompt that can be taken: {left_out}")
        free_memory()  # or it would hold the verifier beside the one that answers
        kept = draws.kept
        write_atomic(path, b"".join(json_line({"id": prompt.id, "turns": list(prompt.turns)}) for prompt in kept))
        counts = {"kept": len(kept), **draws.refused}
        target.finish(counts=counts, selection=selection, content=file_digest(path))
        short = f", fewer than the {limit} asked for" if len(kept) < limit else ""
        print(f"self prompts: {len(kept)} in {folder}{short}; {left_out}")


class Draws:
    """The user turns that the verifier has drawn, and those of them that are kept, in the order of their numbers."""

    def __init__(self, config: Config, source: SourceConfig, folder: Path, limit: int) -> None:
        self._data, self._source, self._limit = config.data, source, limit
        self._questions = load_questions(config.data.exclude)
        self._near = NearDuplicates(near, self._kept_at) if (near := config.data.near_duplicates) else None
        self._journal = Journal(folder / FILE, sync_every_s=_SYNC_EVERY_S)
        self._max_attempts, self._attempts = config.synthesize.max_attempts, Counter[int]()
        self._drawn = dict[int, dict[str, Any]]()
        self._take(read_journal(folder / FILE))
        self._seen = set[int]()
        self._next = 0  # the first number that was not looked at
        self._latest = deque[bool](maxlen=_WINDOW)  # which of the latest draws were kept
        self.kept, self.refused = list[Prompt](), Counter[str]()
        self._select()
        self.progress = Progress("self prompts", limit, "prompt", done=min(limit, len(self.kept)))

    @property
    def missing(self) -> int:
        """Return how many prompts are still to be kept; 0 too if nearly all that is drawn is left out."""
        hopeless = len(self._latest) == _WINDOW and sum(self._latest) < _LEAST
        return 0 if hopeless else max(0, self._limit - len(self.kept))

    @property
    def most(self) -> int:
        """Return the number after the largest that was drawn."""
        return max(self._drawn, default=-1) + 1

    def open(self, start: int, end: int) -> list[int]:
        """Return the numbers of a range that are not drawn yet."""
        return [number for number in range(start, end) if number not in self._drawn]

    def add(self, drawn: dict[int, Drawn]) -> None:
        """Write what was drawn: by its number the text, and why it cannot be taken, if so. Known numbers stay."""
        self._write(
            {"id": str(number), "text": text, "refused": why}
            for number, (text, why) in drawn.items()
            if number not in self._drawn
        )

    def fail(self, number: int, trouble: RequestError) -> bool:
        """Write why a number could not be drawn; return whether it is given up and refused, as a prompt's answer is."""
        why = {"refused": trouble.reason, "detail": trouble.detail, "final": trouble.lasting}
        self._write([{"id": str(number), "text": "", **why}])
        return number in self._drawn

    def _take(self, records: Iterable[dict[str, Any]]) -> None:
        for record in records:
            self._attempts[number := int(record["id"])] += 1
            if record.get("final", True) or self._attempts[number] >= self._max_attempts:
                self._drawn[number] = record

    def _write(self, new: Iterable[dict[str, Any]]) -> None:
        records = list(new)
        self._journal.append(records)
        self._take(records)
        before = min(self._limit, len(self.kept))
        self._select()
        self.progress.set_postfix_str(f"{len(self._drawn)} drawn", refresh=False)
        self.progress.update(min(self._limit, len(self.kept)) - before)

    def _select(self) -> None:
        """Read the draws that follow on those that were read, until enough are kept."""
        while self.missing and self._next in self._drawn:
            record = self._drawn[self._next]
            reason = record["refused"] or self._refusal(self._next, record["text"])
            if reason:
                self.refused[reason] += 1
            self._latest.append(not reason)
            self._next += 1

    def _refusal(self, number: int, text: str) -> str | None:
        """Return why a user turn is left out; keep it if there is no reason."""
        prompt = read_text(text, str(number), self._source)
        if isinstance(prompt, str):
            return prompt
        if reason := refusal(prompt, self._data, self._questions):
            return reason
        said = fingerprint(prompt)
        if self._data.deduplicate and said in self._seen:
            return "duplicate"
        if self._near is not None and not self._near.add(len(self.kept), prompt):
            return "near_duplicate"
        self._seen.add(said)
        self.kept.append(replace(prompt, id=str(number)))
        return None

    def _kept_at(self, place: int) -> Prompt:
        return self.kept[place]

    def close(self) -> None:
        """Make everything durable."""
        self._journal.close()
        self.progress.close()


def _draw_here(config: Config, source: SourceConfig, draws: Draws) -> None:
    """Draw by the verifier in this process; after a signal those at work have `synthesize.grace_s`."""
    if not draws.missing:
        return
    options, name = config.synthesize, source_name(source)
    verifier = load_here(config, source.max_tokens, "data.sources self: max_tokens")
    turn = find_user_turn(verifier.tokenizer, [], verifier.end_token_ids)

    def task(number: int) -> Task:
        draws.add({number: (yield from draw_turn(verifier, turn, source, seed_of(config.data.seed, name, number)))})

    with deferred(f"the prompts being written have {options.grace_s:.0f} s (synthesize.grace_s)") as signals:
        grace = Grace(signals, options.grace_s)
        Generation(verifier, options.batch_size).run(
            (task(number) for number in count() if draws.open(number, number + 1)),
            lambda: bool(draws.missing) and not signals.received,
            lambda: bool(draws.missing) and grace.lasts(),
        )


def _draw_by_servers(config: Config, source: SourceConfig, draws: Draws) -> None:
    """Draw by servers, in rounds of as many as are missing by the share that was kept so far."""
    while missing := draws.missing:
        first = draws.open(0, draws.most)
        share = max(0.1, len(draws.kept) / draws.most) if draws.most else 1.0
        numbers = first or list(range(draws.most, draws.most + int(missing / share) + 1))
        work = _ServerDraws(config, source, draws)
        ask_servers(work, takewhile(lambda _: draws.missing, numbers))
        if work.trouble is not None and draws.missing:
            failed = f"{work.num_failed} prompts could not be drawn, the last: {work.trouble}"
            print(f"fledge: {failed}; what is done is saved, the same command goes on", file=sys.stderr)
            sys.exit(EXIT_AGAIN)


class _ServerDraws(ServerWork[int]):
    """Draws, by their numbers, from completions of a raw prompt."""

    unit = "prompts"

    def __init__(self, config: Config, source: SourceConfig, draws: Draws) -> None:
        super().__init__(config)
        self._source, self._draws, self._seed = source, draws, config.data.seed
        self._raw = RawPrompts(config.verifier, config.synthesize, self._endpoint_verifier.tokenizer)
        self._turn = self._raw.first
        self.trouble: RequestError | None = None
        self.num_failed = 0

    async def _work(self, item: int, slot: Slot) -> None:
        try:
            seed = seed_of(self._seed, source_name(self._source), item)
            drawn = await self._ask(slot, partial(self._raw.draw, self._turn, self._source, seed))
        except RequestError as trouble:
            if not self._draws.fail(item, trouble):
                self.trouble, self.num_failed = trouble, self.num_failed + 1
            return
        finally:
            slot.end()
        self._draws.add({item: drawn})
