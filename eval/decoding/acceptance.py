"""How the verifier chooses the token after each node of a proposal; drafts that are what it chooses are accepted.

Greedy: its most likely token. Sampled: a token drawn from p, its distribution at the temperature (with top_k and top_p
among the likeliest tokens alone). Whatever was proposed, the accepted tokens then have the distribution p.

If draft tokens were drawn from q, their draws are used (speculative sampling: arXiv:2211.17192, arXiv:2302.01318): x is
chosen with probability min(1, p(x) / q(x)), and else a token drawn from max(p - q, 0), normalised, which is never x.
That is distributed as p too. Token t of an answer is always drawn by the answer's random number t, whatever round it
comes about in: a proposal that is not drawn changes no token of it, but for rounding
(docs/internals/speculative_loop.md).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...conf.schema import DraftSampling, EvaluateConfig
from ...models.kernels import run_on
from ...models.verifier.sampling import draw, probabilities
from .proposal import Proposal

NUM_DRAWS = 3  # uniform numbers for each token of an answer: to draft it, to accept the draft, to choose it
_DRAFT, _ACCEPT, _CHOOSE = range(NUM_DRAWS)


@dataclass(frozen=True)
class AcceptanceRule:
    """Greedy at temperature 0, sampled above."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    draft_sampling: DraftSampling = DraftSampling.greedy
    kernels: frozenset[str] = frozenset()  # of `DECODING`, to be used on a GPU

    @classmethod
    def of(cls, options: EvaluateConfig) -> AcceptanceRule:
        """Return the rule of `evaluate`, without kernels."""
        return cls(options.temperature, options.top_p, options.top_k, options.draft_sampling)

    @property
    def draws_drafts(self) -> bool:
        """Whether a draft head draws its tokens."""
        return self.temperature > 0 and self.draft_sampling is DraftSampling.sampled

    def choose(self, logits: Tensor, proposal: Proposal, draws: Tensor) -> Tensor:
        """Choose the token after each node: int64 [B, N + 1].

        Args:
            logits: the verifier's [B, N + 1, V].
            draws: float64 [B, N + 1, NUM_DRAWS], uniform in [0, 1), one row for all nodes of a depth; unused if greedy.
        """
        if "choose" in self.kernels and run_on(logits.device):
            return self._choose_by_kernel(logits, proposal, draws)
        if not self.temperature:
            return logits.argmax(-1)
        p = self.probabilities(logits)
        if proposal.probabilities is None:
            return draw(p, draws[..., _CHOOSE])
        drafts = proposal.tokens[..., None]
        q = torch.zeros_like(p)  # after the last draft token nothing was proposed: what is left of p is all of it
        q[:, :-1] = proposal.probabilities
        passed = draws[:, :-1, _ACCEPT] * q[:, :-1].gather(2, drafts)[..., 0] < p[:, :-1].gather(2, drafts)[..., 0]
        choices = draw(self.residual(p, q), draws[..., _CHOOSE])
        choices[:, :-1] = torch.where(passed, proposal.tokens, choices[:, :-1])
        return choices

    def _choose_by_kernel(self, logits: Tensor, proposal: Proposal, draws: Tensor) -> Tensor:
        from ...models.kernels import choosing

        if not self.temperature:
            return choosing.likeliest(logits)
        cut = self.top_k is not None or self.top_p < 1
        weights, temperature = (self.probabilities(logits), None) if cut else (logits, self.temperature)
        if proposal.probabilities is None:
            return choosing.draw(weights, draws[..., _CHOOSE], temperature)
        numbers = draws[..., _ACCEPT], draws[..., _CHOOSE]
        return choosing.draw_or_accept(weights, proposal.tokens, proposal.probabilities, *numbers, temperature)

    def draft(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return draft tokens int64 [B] by logits [B, Vd] and draws [B, NUM_DRAWS], and q [B, Vd] if drawn by it."""
        if not self.draws_drafts:
            return logits.argmax(-1), None
        q = torch.softmax(logits.float() / self.temperature, -1)
        if "choose" in self.kernels and run_on(q.device):
            from ...models.kernels import choosing

            return choosing.draw(q, draws[:, _DRAFT]), q
        return draw(q, draws[:, _DRAFT]), q

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the distributions float32 [..., V] that tokens are drawn from."""
        return probabilities(logits, self.temperature, self.top_p, self.top_k)

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """Return what p has more than q, in proportion; p if rounding leaves nothing."""
        rest = (p - q).clamp(min=0)
        return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


GREEDY = AcceptanceRule()


def uniform_draws(seed: str, num_tokens: int) -> Tensor:
    """Return the numbers of the answer that the seed names: float64 [num_tokens, NUM_DRAWS]."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
    return torch.rand(num_tokens, NUM_DRAWS, generator=generator, dtype=torch.float64)
