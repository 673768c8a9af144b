"""Speculative decoding with a chain of draft tokens, one sequence at a time.

prefill        the verifier reads the prompt and gives the first token
every round    draft:  K tokens
               verify: the verifier reads [last token, K drafts] in one forward
               accept: drafts as the rule has it (eval/acceptance.py), and its own token after them (the bonus token)
               commit: both caches keep what was accepted, and nothing of what was not
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from ..models.verifier import Verifier
from .acceptance import GREEDY, AcceptanceRule, Proposal


class Drafter(Protocol):
    """Whatever proposes tokens."""

    name: str

    def start(self, prompt: list[int]) -> None:
        """Begin a new sequence."""

    def extend(self, fed: list[int], aux_hidden_states: Tensor) -> None:
        """Learn that position by position the verifier had these aux states [n, A*H] and that `fed` [n] came next."""

    def propose(self, num_draft_tokens: int, rule: AcceptanceRule) -> Proposal:
        """Propose at most `num_draft_tokens` tokens; a drafter that has distributions lets the rule choose."""


@dataclass
class Decoded:
    """An answer and how it came about."""

    tokens: list[int]  # end-of-turn included, cut at max_tokens
    drafted: list[int] = field(default_factory=list)  # draft tokens proposed, by round
    accepted: list[int] = field(default_factory=list)  # of them accepted; in the last round those beyond the end too
    seconds: float = 0.0  # after prefill


@torch.no_grad()
def speculate(
    verifier: Verifier,
    drafter: Drafter,
    prompt: list[int],
    num_draft_tokens: int,
    max_tokens: int,
    rule: AcceptanceRule = GREEDY,
) -> Decoded:
    """Answer a prompt; whatever the drafter proposes, the tokens are the verifier's own, or distributed as its own.

    Raises:
        ValueError: the prompt leaves no room in the verifier's context.
    """
    room = verifier.model.config.get_text_config().max_position_embeddings - len(prompt) - num_draft_tokens - 1
    if room < 1:
        raise ValueError(f"a prompt of {len(prompt)} tokens fills the verifier's context: shorten it")
    max_tokens = min(max_tokens, room)
    cache = DynamicCache()  # whole layers also where attention slides: a rejected draft must be removable
    output = verifier.forward(torch.tensor([prompt], device=verifier.device), past_key_values=cache, logits_to_keep=1)
    new = [rule.choose(output.logits[0, -1])[0]]
    decoded = Decoded(tokens=list(new))
    drafter.start(prompt)
    drafter.extend(prompt[1:] + new, output.aux_hidden_states[0])
    started = time.perf_counter()
    while not _ended(decoded.tokens, new, verifier.end_token_ids, max_tokens):
        proposal = drafter.propose(num_draft_tokens, rule)
        fed = torch.tensor([[new[-1], *proposal.tokens]], device=verifier.device)
        output = verifier.forward(fed, past_key_values=cache)
        new = rule.accept(proposal, output.logits[0])
        drafted, accepted = len(proposal.tokens), len(new) - 1
        if accepted < drafted:
            cache.crop(accepted - drafted)
        drafter.extend(new, output.aux_hidden_states[0, : len(new)])
        decoded.tokens += new
        decoded.drafted.append(drafted)
        decoded.accepted.append(accepted)
    decoded.seconds = time.perf_counter() - started
    decoded.tokens = _cut(decoded.tokens, verifier.end_token_ids)[:max_tokens]
    return decoded


def _ended(tokens: list[int], new: list[int], end_token_ids: list[int], max_tokens: int) -> bool:
    return len(tokens) >= max_tokens or any(token in end_token_ids for token in new)


def _cut(tokens: list[int], end_token_ids: list[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in end_token_ids), len(tokens) - 1)
    return tokens[: end + 1]
