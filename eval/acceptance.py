"""How tokens are chosen and draft tokens accepted: greedily, or by sampling.

Greedy: a draft token is accepted where it is the verifier's most likely one, which takes its place where it is not.

Sampled at temperature t, with p and q the verifier's and the drafter's distributions at t: a draft token x is accepted
with probability min(1, p(x) / q(x)); the first one that is not gives way to a token drawn from max(p - q, 0),
normalised; where all are accepted the bonus token is drawn from p. Every token then has exactly the distribution p
(speculative sampling: arXiv:2211.17192, arXiv:2302.01318).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Proposal:
    """Draft tokens, in a row."""

    tokens: list[int]
    probabilities: Tensor | None = None  # [n, V], what each was drawn from; None: nothing but that token was possible


class AcceptanceRule(Protocol):
    """A way to choose tokens and to accept those of a draft."""

    def choose(self, logits: Tensor) -> tuple[int, Tensor | None]:
        """Choose a token by logits [V]; give it and, where it was drawn, the distribution [V]."""

    def accept(self, proposal: Proposal, logits: Tensor) -> list[int]:
        """Give the n accepted draft tokens and the verifier's token after them.

        Args:
            logits: the verifier's [drafts + 1, V], after the text and after each draft token.
        """


class Greedy:
    """The most likely token, always."""

    def choose(self, logits: Tensor) -> tuple[int, Tensor | None]:
        return int(logits.argmax()), None

    def accept(self, proposal: Proposal, logits: Tensor) -> list[int]:
        choices: list[int] = logits.argmax(-1).tolist()
        accepted = 0
        while accepted < len(proposal.tokens) and proposal.tokens[accepted] == choices[accepted]:
            accepted += 1
        return choices[: accepted + 1]


GREEDY = Greedy()


class Sampled:
    """Tokens drawn at a temperature above 0.

    Args:
        seed: whatever names the answer: the same gives the same draws.
    """

    def __init__(self, temperature: float, device: torch.device, seed: str) -> None:
        self._temperature = temperature
        self._generator = torch.Generator(device)
        self._generator.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))

    def choose(self, logits: Tensor) -> tuple[int, Tensor | None]:
        probabilities = self._probabilities(logits)
        return self._draw(probabilities), probabilities

    def accept(self, proposal: Proposal, logits: Tensor) -> list[int]:
        p, num_draft_tokens = self._probabilities(logits), len(proposal.tokens)
        drafts = torch.tensor(proposal.tokens, dtype=torch.int64, device=p.device)[:, None]
        q = torch.zeros_like(p)  # after the last draft token nothing was proposed: what is left of p is all of it
        if proposal.probabilities is None:
            q[:num_draft_tokens].scatter_(1, drafts, 1.0)
        else:
            q[:num_draft_tokens] = proposal.probabilities
        chances = (p[:num_draft_tokens].gather(1, drafts) / q[:num_draft_tokens].gather(1, drafts)).squeeze(1)
        passed = torch.rand(num_draft_tokens, generator=self._generator, device=p.device) < chances
        accepted = int(passed.long().cumprod(0).sum())
        return [*proposal.tokens[:accepted], self._draw(self._residual(p[accepted], q[accepted]))]

    def _probabilities(self, logits: Tensor) -> Tensor:
        return torch.softmax(logits.float() / self._temperature, -1)

    def _residual(self, p: Tensor, q: Tensor) -> Tensor:
        """Give what p has more than q, in proportion; p where rounding leaves nothing."""
        rest = (p - q).clamp(min=0)
        return torch.where(rest.sum() > 0, rest, p)

    def _draw(self, weights: Tensor) -> int:
        return int(torch.multinomial(weights, 1, generator=self._generator))
