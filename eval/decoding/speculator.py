"""Speculative decoding of B sequences at a time.

The verifier reads each prompt once and gives the first token. A round then drafts (a `Drafter` of proposal.py),
verifies [last token, drafts] in one forward (models/verifier/cache.py), accepts the drafts that are what the verifier
chose, and its last choice with them, the bonus token (acceptance.py, proposal.py), and commits these to both caches.

A round reads nothing back from the device but, at its end, the new tokens, their number and the draft refused. Prompt
lookup reads the text, before and after what its graph holds. More in docs/internals/speculative_loop.md.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ...models.verifier.cache import CachedVerifier, round_up
from ...models.verifier.model import Verifier
from .acceptance import GREEDY, NUM_DRAWS, AcceptanceRule, uniform_draws
from .graphs import Graphs
from .prompt_lookup import NoDraft
from .proposal import NOTHING, Drafter, NewRows, Proposal, accepted_path


@dataclass
class Request:
    """A prompt to be answered."""

    prompt: list[int]
    max_tokens: int
    seed: str = ""  # of a sampled answer
    inputs: dict[str, Any] = field(default_factory=dict)  # of the verifier besides tokens: pixels


@dataclass
class Answer:
    """An answer and how it came about."""

    tokens: list[int] = field(default_factory=list)  # end-of-turn included
    drafted: list[int] = field(default_factory=list)  # draft tokens proposed, by round
    accepted: list[int] = field(default_factory=list)  # of them accepted; in the last round those beyond the end too
    refused: list[int] = field(default_factory=list)  # the draft after these, in a chain; NOTHING if there is none
    # Of its rounds, each shared out among the sequences that it was for. Reading the prompt is left out, by verifier
    # and by head; on a GPU the first rounds of a length, in which a graph is captured, are in.
    seconds: float = 0.0

    def extend(self, tokens: list[int], end_token_ids: list[int], max_tokens: int) -> bool:
        """Add tokens up to one that ends the turn, or to the limit; return whether more may follow."""
        for token in tokens:
            self.tokens.append(token)
            if token in end_token_ids or len(self.tokens) >= max_tokens:
                return False
        return True


class Speculator:
    """Answers up to B = `num_sequences` requests at a time, with one of its drafters after another.

    With `cuda_graphs` a round is captured on one GPU and replayed.
    """

    def __init__(
        self,
        verifier: Verifier,
        drafters: Sequence[Drafter],
        rule: AcceptanceRule = GREEDY,
        num_sequences: int = 1,
        cuda_graphs: bool = True,
    ) -> None:
        self.verifier, self.rule = verifier, rule
        self.cached = CachedVerifier(verifier, num_sequences)
        self._drafters, self._num_sequences = list(drafters), num_sequences
        self._num_nodes = max((drafter.num_draft_tokens for drafter in drafters), default=0)
        self._depth = max((drafter.depth for drafter in drafters), default=0)
        self._num_rows = max((drafter.num_draft_rows for drafter in drafters), default=0)
        device = verifier.device
        one_gpu = device.type == "cuda" and len(set(getattr(verifier.model, "hf_device_map", {}).values())) < 2
        self._graphs = Graphs(device) if cuda_graphs and one_gpu else None
        self._requests: list[Request] = []
        self._limits: list[int] = []  # of tokens, for each
        self._first: list[int] = []  # tokens of the answers
        # Prompts read together: their places, their tokens [b, P], and the aux states of these [b, P, A*H].
        self._read: list[tuple[slice, Tensor, Tensor]] = []
        # Of every sequence: tokens in the caches, the text's last token (which is not), tokens of the prompt, and
        # whether it goes on. Always the same memory, which graphs read and write.
        self._lengths, self._last, self._prompts = torch.zeros(3, num_sequences, dtype=torch.int64, device=device)
        self._going = torch.zeros(num_sequences, dtype=torch.bool, device=device)
        self._proposed = torch.zeros(num_sequences, self._num_nodes, dtype=torch.int64, device=device)
        self._draws = torch.zeros(num_sequences, 1, NUM_DRAWS, dtype=torch.float64, device=device)

    @torch.no_grad()
    def prefill(self, requests: list[Request]) -> None:
        """Read prompts, at most B; then `decode` answers them, as often as it is called."""
        assert 0 < len(requests) <= self._num_sequences
        self._limits = []
        for request in requests:
            room = self.cached.context - len(request.prompt) - self._depth - 1
            if room < 1:
                number, most = len(request.prompt), self.cached.context
                raise ValueError(f"a prompt of {number} tokens fills the verifier's context of {most}: shorten it")
            self._limits.append(min(request.max_tokens, room))
        self._requests = requests
        self._reserve()
        self._read, self._first = [], []
        # Prompts that follow each other are read together if they are as long, and of tokens alone.
        kinds = [(len(r.prompt), place if r.inputs else None) for place, r in enumerate(requests)]
        for (length, _), alike in groupby(range(len(requests)), kinds.__getitem__):
            start, *others = alike
            places = slice(start, start + 1 + len(others))
            tokens = torch.tensor([request.prompt for request in requests[places]], device=self.verifier.device)
            lengths, inputs = self._lengths[places].zero_(), requests[start].inputs
            output = self.cached.forward(tokens, lengths, length, places, is_prompt=True, logits_to_keep=1, **inputs)
            nothing = Proposal(tokens.new_zeros(len(tokens), 0))
            choices = self.rule.choose(output.logits, nothing, self._draws[places, :1])
            self._read.append((places, tokens, output.aux_hidden_states))
            self._first += choices[:, 0].tolist()

    def _reserve(self) -> None:
        """Take the memory that the requests need, and draw their numbers; graphs do not outlive memory that moves."""
        # The last round begins with a token to go at most, and adds no more than the nodes of a proposal and one.
        longest = max(len(r.prompt) + limit for r, limit in zip(self._requests, self._limits, strict=True))
        num_slots = longest + self._depth + max(self._num_nodes, self._num_rows) + 2
        moved = [self.cached.reserve(num_slots), *(drafter.reserve(num_slots) for drafter in self._drafters)]
        if self.rule.temperature:
            num_draws = max(self._limits) + 2 * self._depth + 2
            if num_draws > self._draws.shape[1]:
                self._draws = self._draws.new_zeros(self._num_sequences, round_up(num_draws), NUM_DRAWS)
                moved.append(True)
            for place, request in enumerate(self._requests):
                self._draws[place] = uniform_draws(request.seed, self._draws.shape[1]).to(self._draws.device)
        if any(moved) and self._graphs:
            self._graphs.clear()

    @torch.no_grad()
    def decode(self, drafter: Drafter, max_tokens: int | None = None) -> list[Answer]:
        """Answer the prompts, with tokens that are, or are distributed as, the verifier's own, whatever is proposed."""
        limits = [min(limit, max_tokens or limit) for limit in self._limits]
        assert drafter.num_draft_tokens <= self._num_nodes, "more than memory was taken for"
        assert drafter.depth <= self._depth, "more than memory was taken for"
        assert drafter in self._drafters or not drafter.num_draft_rows, "a drafter that no memory was taken for"
        self._start(drafter)
        ends = self.verifier.end_token_ids
        prompts = [len(request.prompt) for request in self._requests]
        lengths = list(prompts)
        answers = [Answer() for _ in self._requests]
        starts = zip(answers, self._first, limits, strict=True)
        going = [answer.extend([first], ends, limit) for answer, first, limit in starts]
        self._set_going(going)
        while any(going):
            started = time.perf_counter()
            num_read = round_up(max(lengths) + 2 + max(drafter.num_draft_tokens, drafter.num_draft_rows))
            rows = self._run_round(drafter, num_read).tolist()  # the one wait for the device
            share = (time.perf_counter() - started) / sum(going)
            for place, answer in enumerate(answers):
                if not going[place]:
                    continue
                drafted, accepted, refused, *tokens = rows[place]
                answer.drafted.append(drafted)
                answer.accepted.append(accepted)
                answer.refused.append(refused)
                answer.seconds += share
                going[place] = answer.extend(tokens[: accepted + 1], ends, limits[place])
                lengths[place] = lengths[place] + accepted + 1 if going[place] else prompts[place]
            if not all(going):
                self._set_going(going)
        return answers

    def _start(self, drafter: Drafter) -> None:
        """Take every sequence back to its prompt and first token."""
        self._lengths.zero_()
        self._last.zero_()
        self._last[: len(self._first)] = torch.tensor(self._first, device=self._last.device)
        for places, prompts, aux in self._read:
            fed = torch.cat([prompts[:, 1:], self._last[places, None]], 1)
            counts = torch.full_like(self._lengths[places], prompts.shape[1])
            drafter.extend(NewRows(fed, self._lengths[places], counts, prompts.shape[1], places), aux)
            self._lengths[places] = counts
        self._prompts.copy_(self._lengths)

    def _set_going(self, going: list[bool]) -> None:
        """Set which sequences go on; the others idle at the end of their prompts, away from the context's end."""
        self._going.copy_(torch.tensor([*going, *[False] * (self._num_sequences - len(going))]))
        self._lengths.copy_(torch.where(self._going, self._lengths, self._prompts))

    def _run_round(self, drafter: Drafter, num_read: int) -> Tensor:
        """Run a round, from its graph if there are graphs; a drafter that looks at values stays outside of it."""
        if self._graphs is None:
            return self._round(drafter, num_read)
        if drafter.on_device:
            return self._graphs.run((drafter, num_read), lambda: self._round(drafter, num_read))
        tokens = self._proposed[:, : drafter.num_draft_tokens]
        proposal = drafter.propose(self._numbers(self._depth), num_read)
        assert proposal.tree is None and proposal.probabilities is None  # noqa: PT018 (a chain that was not drawn)
        tokens.copy_(proposal.tokens)
        lengths = self._lengths.clone()
        rows = self._graphs.run((drafter, num_read), lambda: self._verify(Proposal(tokens), NoDraft(), num_read))
        counts = torch.where(self._going, rows[:, 1] + 1, 1)
        drafter.extend(NewRows(rows[:, 3:], lengths, counts, num_read), rows.new_empty(*rows[:, 3:].shape, 0))
        return rows

    def _round(self, drafter: Drafter, num_read: int) -> Tensor:
        return self._verify(drafter.propose(self._numbers(self._depth), num_read), drafter, num_read)

    def _verify(self, proposal: Proposal, drafter: Drafter, num_read: int) -> Tensor:
        """Verify, accept, commit; return of each sequence [drafted, accepted, refused, new tokens ...] (int64)."""
        lengths, going = self._lengths, self._going
        tokens, tree = proposal.tokens, proposal.tree
        fed = torch.cat([self._last[:, None], tokens.clamp(min=0)], 1)  # `NOTHING` cannot be fed
        output = self.cached.forward(fed, lengths, num_read, tree=tree)
        numbers = self._numbers(fed.shape[1], tree.depths if tree else None)
        choices = self.rule.choose(output.logits, proposal, numbers)
        path = accepted_path(proposal, choices, "way" in self.rule.kernels)
        aux = output.aux_hidden_states  # of a chain, those of the path come first
        if tree is not None:
            slots = lengths[:, None] + torch.arange(path.nodes.shape[1], device=lengths.device)
            self.cached.cache.move(lengths[:, None] + path.nodes, slots, "move" in self.rule.kernels)
            aux = aux.gather(1, path.nodes[:, :, None].expand(-1, -1, aux.shape[-1]))
        counts = torch.where(going, path.accepted + 1, 1)
        drafter.extend(NewRows(path.tokens, lengths, counts, num_read), aux)
        last = path.tokens.gather(1, path.accepted[:, None])[:, 0]
        self._last.copy_(torch.where(going, last, self._last))
        lengths.add_(torch.where(going, counts, 0))
        ended = torch.full_like(path.accepted[:, None], NOTHING)  # a tree refuses several
        refused = torch.cat([tokens, ended], 1).gather(1, path.accepted[:, None]) if tree is None else ended
        return torch.cat([(tokens >= 0).sum(1)[:, None], path.accepted[:, None], refused, path.tokens], 1)

    def _numbers(self, number: int, depths: Tensor | None = None) -> Tensor:
        """Return the uniform numbers for the tokens after nodes of depths [B, number]; 0, 1, ... if None."""
        if not self.rule.temperature:
            return self._draws[:, :1].expand(-1, number, -1)
        answered = (self._lengths - self._prompts + 1)[:, None]
        depths = torch.arange(number, device=answered.device) if depths is None else depths
        places = (answered + depths).clamp(max=self._draws.shape[1] - 1)
        return self._draws.gather(1, places[:, :, None].expand(-1, -1, NUM_DRAWS))


def answer_alone(verifier: Verifier, prompt: list[int], max_tokens: int) -> list[int]:
    """Return the verifier's own greedy answer."""
    speculator = Speculator(verifier, [])
    if len(prompt) > 2:
        speculator.cached.check(prompt)
    speculator.prefill([Request(prompt, max_tokens)])
    return speculator.decode(NoDraft())[0].tokens
