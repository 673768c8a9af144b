"""How the verifier chooses the token after each node of a proposal; drafts that are what it chooses are accepted.

Greedy: its most likely token.

Sampled, with p its distribution at the temperature (with top_k and top_p among the likeliest tokens alone): a token
drawn from p. Whatever was proposed, the tokens of the way then have the distribution p, for a proposal that is not
drawn says nothing of the draw: a draft token x is accepted with probability p(x), and siblings with that of their sum.

Where draft tokens were drawn from q, their draws are used (speculative sampling: arXiv:2211.17192, arXiv:2302.01318): x
is chosen with probability min(1, p(x) / q(x)), and else a token drawn from max(p - q, 0), normalised, which is never x.
That is distributed as p too, and accepts sum min(p, q), the most that is possible.

Token t of an answer is always drawn by the answer's random number t, whatever round it comes about in. A proposal that
is not drawn therefore changes nothing: the answer is, token for token, that of the verifier alone (but where a number
is so near to a token's border, or two logits to each other, that the rounding of a forward of other length decides).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...conf.schema import DraftSampling, EvaluateConfig
from ...models.kernels import run_on
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
    kernels: frozenset[str] = frozenset()  # those, of `DECODING`, in which whoever works by this rule does so on a GPU

    @classmethod
    def of(cls, options: EvaluateConfig) -> AcceptanceRule:
        """Give the rule that the options ask for, without kernels."""
        return cls(options.temperature, options.top_p, options.top_k, options.draft_sampling)

    @property
    def draws_drafts(self) -> bool:
        """Whether a draft head draws its tokens."""
        return self.temperature > 0 and self.draft_sampling is DraftSampling.sampled

    def choose(self, logits: Tensor, proposal: Proposal, draws: Tensor) -> Tensor:
        """Choose the token after each node: int64 [B, N + 1].

        Args:
            logits: the verifier's [B, N + 1, V].
            draws: float64 [B, N + 1, NUM_DRAWS], uniform in [0, 1), one row for all nodes of a depth; not used where
                greedy.
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
        of = (self.probabilities(logits), None) if cut else (logits, self.temperature)
        if proposal.probabilities is None:
            return choosing.draw(of[0], draws[..., _CHOOSE], of[1])
        numbers = draws[..., _ACCEPT], draws[..., _CHOOSE]
        return choosing.draw_or_accept(of[0], proposal.tokens, proposal.probabilities, *numbers, of[1])

    def draft(self, logits: Tensor, draws: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose a draft token by logits [B, Vd]: int64 [B]; and, where it was drawn, the distribution [B, Vd].

        Args:
            draws: float64 [B, NUM_DRAWS].
        """
        if not self.draws_drafts:
            return logits.argmax(-1), None
        q = torch.softmax(logits.float() / self.temperature, -1)
        if "choose" in self.kernels and run_on(q.device):
            from ...models.kernels import choosing

            return choosing.draw(q, draws[:, _DRAFT]), q
        return draw(q, draws[:, _DRAFT]), q

    def probabilities(self, logits: Tensor) -> Tensor:
        """Give the distributions float32 [..., V] that tokens are drawn from."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        p = torch.softmax(logits, -1)
        if self.top_p < 1:
            ordered, tokens = p.sort(descending=True, stable=True)
            before = ordered.cumsum(-1) - ordered
            p = torch.zeros_like(p).scatter_(-1, tokens, ordered.masked_fill(before >= self.top_p, 0.0))
            p = p / p.sum(-1, keepdim=True)
        return p

    def residual(self, p: Tensor, q: Tensor) -> Tensor:
        """Give what p has more than q, in proportion; p where rounding leaves nothing."""
        rest = (p - q).clamp(min=0)
        return torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)


GREEDY = AcceptanceRule()


def draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Draw by weights [..., V]: int64 [...], the first token up to which they sum to more than their share.

    Args:
        draws: float64 [...], uniform in [0, 1).
    """
    sums = weights.double().cumsum(-1)
    share = draws[..., None] * sums[..., -1:]
    return torch.searchsorted(sums, share, right=True)[..., 0].clamp(max=weights.shape[-1] - 1)


def uniform_draws(seed: str, num_tokens: int) -> Tensor:
    """Give the numbers of an answer: float64 [num_tokens, NUM_DRAWS], whatever device and batch it is on.

    Args:
        seed: whatever names the answer: the same gives the same numbers.
    """
    generator = torch.Generator()
    generator.manual_seed(int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16))
    return torch.rand(num_tokens, NUM_DRAWS, generator=generator, dtype=torch.float64)
