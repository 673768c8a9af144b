"""Drafters that know the answers, so that much is accepted whatever the verifier."""

from __future__ import annotations

import torch
from fledge.eval.decoding.proposal import Drafter, NewRows, Proposal, Tree


class Oracle(Drafter):
    """Proposes the continuation of known answers as a chain.

    Args:
        answers: one for each sequence of the batch.
        wrong: the share of tokens that are another instead, drawn by `seed`.
    """

    def __init__(self, answers: list[list[int]], num_draft_tokens: int, wrong: float = 0.0, seed: int = 0) -> None:
        self.answers, self.wrong = answers, wrong
        self.num_draft_tokens = self.depth = num_draft_tokens
        self.known = [0] * len(answers)
        self.generator = torch.Generator().manual_seed(seed)

    def extend(self, rows: NewRows, aux_hidden_states: torch.Tensor) -> None:
        assert rows.fed.shape == aux_hidden_states.shape[:2]
        places = range(len(self.answers))[rows.sequences]
        for place, length, count in zip(places, rows.lengths.tolist(), rows.counts.tolist(), strict=True):
            self.known[place] = self.known[place] + count if length else 1

    def continuation(self, place: int) -> list[int]:
        known = self.known[place]
        row = [*self.answers[place][known : known + self.depth], *[0] * self.depth][: self.depth]
        wrong = (torch.rand(self.depth, generator=self.generator) < self.wrong).tolist()
        return [(token + 1) % 100 if errs else token for token, errs in zip(row, wrong, strict=True)]

    def propose(self, draws, num_read) -> Proposal:
        return Proposal(torch.tensor([self.continuation(place) for place in range(len(self.answers))]))


class TreeOracle(Oracle):
    """Proposes the continuation as one way through a tree of other tokens, a new one each round.

    Args:
        depth: of the right way; `num_nodes` are proposed altogether.
    """

    def __init__(self, answers: list[list[int]], num_nodes: int, depth: int, wrong: float = 0.0, seed: int = 0) -> None:
        super().__init__(answers, depth, wrong, seed)
        self.num_draft_tokens, self.depth = num_nodes, depth

    def propose(self, draws, num_read) -> Proposal:
        trees = [self._tree(self.continuation(place)) for place in range(len(self.answers))]
        tokens, parents, ancestors = (torch.stack(parts) for parts in zip(*trees, strict=True))
        return Proposal(tokens, Tree(parents, ancestors.sum(2) - 1, ancestors, self.depth))

    def _tree(self, way: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num = self.num_draft_tokens
        right = (torch.randperm(num, generator=self.generator)[: len(way)] + 1).sort().values.tolist()
        tokens, parents, last = [], [], 0
        ancestors = torch.eye(num + 1, dtype=torch.bool)
        for node in range(1, num + 1):
            if node in right:
                parent, token = last, way[right.index(node)]
                last = node
            else:
                shallow = [other for other in range(node) if ancestors[other].sum() <= self.depth]
                parent = shallow[int(torch.randint(len(shallow), (1,), generator=self.generator))]
                token = node  # no two alike, and special ones, which answers seldom have
            tokens.append(token)
            parents.append(parent)
            ancestors[node] |= ancestors[parent]
        return torch.tensor(tokens), torch.tensor(parents), ancestors
