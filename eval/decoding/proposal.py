"""What a drafter proposes, a chain or a tree, and the path of it that the verifier accepts.

Node 0 is the last token of the text, node i the i-th token proposed. The verifier reads them in one forward and chooses
a token after each. From node 0 on, the path goes to the child that is the token chosen, as long as there is one:

    nodes      0: sat   1: on   2: .   3: the   4: a         parents of 1 to 4: 0 0 1 1
    chosen after each   on     the           mat
    path       0 -> 1 -> 3, new tokens: on the mat           two drafts accepted, and the bonus token
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...models.kernels import run_on
from ...models.verifier.cache import Tree

NOTHING = -1  # in place of a token that is not proposed


@dataclass
class Proposal:
    """Draft tokens of B sequences."""

    tokens: Tensor  # int64 [B, N]
    tree: Tree | None = None  # None: a chain
    probabilities: Tensor | None = None  # float32 [B, N, V], what each was drawn from; None: none was drawn

    @property
    def depth(self) -> int:
        """Return how many draft tokens can be accepted."""
        return self.tokens.shape[1] if self.tree is None else self.tree.depth


class NewRows(NamedTuple):
    """Positions that texts have come to, and the token that came next after each: rows of a drafter's cache."""

    fed: Tensor  # int64 [b, n], that token
    lengths: Tensor  # int64 [b], how many positions were known before
    counts: Tensor  # int64 [b], how many of the n are now, at least one; the others are to be written over
    num_read: int  # at least the positions of the longest text
    sequences: slice = slice(None)  # which b of the batch's


class Drafter(Protocol):
    """The contract of whatever proposes tokens (docs/internals/add_a_drafter.md), and its defaults for subclasses."""

    on_device: bool = False  # proposes without a look at values on the host, so that a round can be a CUDA graph
    draws_tokens: bool = False  # its proposals have probabilities, and answers differ from the verifier's own
    num_draft_tokens: int = 0  # of a proposal, at most
    depth: int = 0  # draft tokens of a proposal that can be accepted
    num_draft_rows: int = 0  # that a proposal takes in the drafter's cache beyond those of the text

    def reserve(self, num_slots: int) -> bool:
        """Take memory for sequences of this many tokens; return whether it is new, and all content gone."""
        return False

    def extend(self, rows: NewRows, aux_hidden_states: Tensor) -> None:
        """Learn new rows, each with the aux states [b, n, A*H] that the verifier had at its position."""
        return  # else mypy takes it to be abstract

    def propose(self, draws: Tensor, num_read: int) -> Proposal:
        """Propose tokens for every sequence.

        Args:
            draws: float64 [B, depth, NUM_DRAWS], uniform numbers, one row a depth.
            num_read: at least the positions of the longest text, and what a proposal takes beyond.
        """
        ...


@dataclass
class AcceptedPath:
    """The nodes that the verifier accepted, in B trees or chains of depth D."""

    nodes: Tensor  # int64 [B, D + 1], from node 0 on; the last one again beyond the end
    tokens: Tensor  # int64 [B, D + 1], chosen after each: accepted drafts and the bonus token
    accepted: Tensor  # int64 [B], drafts


def accepted_path(proposal: Proposal, choices: Tensor, kernels: bool = False) -> AcceptedPath:
    """Return the path through a proposal.

    Args:
        choices: int64 [B, N + 1], the token chosen after each node.
        kernels: on a GPU, use the Triton kernel.
    """
    tokens, tree = proposal.tokens, proposal.tree
    if kernels and run_on(tokens.device):
        from ...models.kernels import decoding

        return AcceptedPath(*decoding.accepted_path(tokens, tree.parents if tree else None, choices, proposal.depth))
    none = choices.shape[1]
    steps = torch.arange(none, device=choices.device)
    if tree is None:
        accepted = (tokens == choices[:, :-1]).long().cumprod(1).sum(1)
        nodes = torch.minimum(steps, accepted[:, None])
        return AcceptedPath(nodes, choices.gather(1, nodes), accepted)
    child = torch.where(tokens == choices.gather(1, tree.parents), steps[1:], none)
    first = torch.full_like(choices, none).scatter_reduce(1, tree.parents, child, "amin")
    after = torch.where(first == none, steps, first)  # the node that the path goes to from each
    path = [torch.zeros_like(choices[:, :1])]
    for _ in range(tree.depth):
        path.append(after.gather(1, path[-1]))
    nodes = torch.cat(path, 1)
    return AcceptedPath(nodes, choices.gather(1, nodes), (nodes.diff(dim=1) > 0).sum(1))


def grow_tree(scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int, depth: int) -> tuple[Tensor, Tree]:
    """Return the tokens [B, num_nodes] of the highest scores, of equal ones the first, and the tree that they are.

    Args:
        scores: float32 [B, C], of a candidate never higher than its parent's.
        tokens: int64 [B, C].
        parents: int64 [B, C], candidates too, and before their children; -1 for those after the root.
        depth: of the deepest candidate.
    """
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes].sort(1).values
    above = parents.gather(1, best)
    node_above = torch.searchsorted(best, above.clamp(min=0)) + 1
    node_above = torch.where(above < 0, 0, node_above)
    itself = torch.eye(num_nodes + 1, dtype=torch.bool, device=scores.device).expand(len(scores), -1, -1)
    ancestors = itself
    up = torch.nn.functional.pad(node_above, (1, 0))[:, :, None].expand(-1, -1, num_nodes + 1)
    for _ in range(depth):
        ancestors = ancestors.gather(1, up) | itself
    return tokens.gather(1, best), Tree(node_above, ancestors.sum(2) - 1, ancestors, depth)
