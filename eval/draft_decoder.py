"""Cached decoding with a draft head: what the serving engines do with it, one sequence at a time."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.draft_head import DraftHead
from .acceptance import GREEDY, AcceptanceRule, Proposal


class DraftDecoder:
    """Proposes tokens with a draft head and its key-value cache.

    Row r of the cache is fed token r+1 with the state of position r. `extend` adds rows from the verifier's states;
    rows that `propose` adds from the head's own states are overwritten by the next `extend`.

    Args:
        embedding: the verifier's token embedding [V, H].
    """

    name = "draft head"

    def __init__(self, head: DraftHead, embedding: Tensor) -> None:
        self.head = head.eval()
        self.embedding = embedding
        config = head.config
        shape = (config.num_layers, 2, config.num_key_value_heads, 256, config.head_dim)
        self._cache = torch.zeros(shape, dtype=embedding.dtype, device=embedding.device)
        self._target_ids = head.target_ids
        self.num_rows = 0  # rows with the verifier's states
        self._first = 0  # row of the queries now running
        self._state = self._normed = torch.empty(0)

    def start(self, prompt: list[int]) -> None:
        """Forget everything before a new sequence."""
        self.num_rows = 0

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write keys and values at the rows now running and attend to all rows up to each query's own."""
        last = self._first + len(q)
        while last > self._cache.shape[-2]:
            self._cache = torch.cat([self._cache, torch.zeros_like(self._cache)], dim=-2)
        keys, values = self._cache[layer]
        keys[:, self._first : last], values[:, self._first : last] = k.transpose(0, 1), v.transpose(0, 1)
        rows = torch.arange(self._first, last, device=q.device)
        mask = rows[:, None] >= torch.arange(last, device=q.device)[None, :] if len(q) > 1 else None
        out = nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys[None, :, :last], values[None, :, :last], attn_mask=mask, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    def _run(self, tokens: Tensor, state: Tensor, first: int) -> None:
        self._first = first
        positions = torch.arange(first, first + len(tokens), device=state.device)
        fed = self.head.embed(tokens, self.embedding)
        state, normed = self.head.step(fed, state, self.head.rotary(positions, state), self._attend)
        self._state, self._normed = state[-1:], normed[-1:]

    @torch.no_grad()
    def extend(self, fed: list[int], aux_hidden_states: Tensor) -> None:
        """Add rows: tokens `fed` [n], each the successor of the position whose aux states [n, A*H] stand beside it."""
        tokens = torch.tensor(fed, device=self.embedding.device)
        self._run(tokens, self.head.fuse(aux_hidden_states), self.num_rows)
        self.num_rows += len(fed)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Give the draft logits [Vd] after the last row."""
        return self.head.lm_head(self._normed)[0]

    @torch.no_grad()
    def feed(self, token: int, step: int) -> None:
        """Run draft step k >= 1: feed a token with the head's own state, at rotary position r + k."""
        tokens = torch.tensor([token], device=self.embedding.device)
        self._run(tokens, self._state, self.num_rows - 1 + step)

    @torch.no_grad()
    def propose(self, num_draft_tokens: int, rule: AcceptanceRule = GREEDY) -> Proposal:
        """Give a chain of draft tokens, each chosen by the rule from the head's logits."""
        tokens: list[int] = []
        drawn_from: list[Tensor] = []
        for step in range(num_draft_tokens):
            if step:
                self.feed(tokens[-1], step)
            token, probabilities = rule.choose(self.logits())
            tokens.append(int(self._target_ids[token]))
            if probabilities is not None:
                drawn_from.append(probabilities)
        return Proposal(tokens, self._of_verifiers_vocabulary(torch.stack(drawn_from)) if drawn_from else None)

    def _of_verifiers_vocabulary(self, probabilities: Tensor) -> Tensor:
        """Spread probabilities [n, Vd] over the verifier's tokens [n, V]."""
        spread = probabilities.new_zeros(len(probabilities), len(self.head.t2d))
        return spread.index_copy_(1, self._target_ids, probabilities)
