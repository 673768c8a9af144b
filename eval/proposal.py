"""What a drafter proposes, a chain or a tree, and the way through it that the verifier goes.

Node 0 is the last token of the text, node i the i-th token proposed. The verifier reads them in one forward and chooses
a token after each; from node 0 on, the way goes to the child that is the token chosen, as long as there is one:

    nodes      0: sat   1: on   2: .   3: the   4: a         parents of 1 to 4: 0 0 1 1
    chosen after each   on     the           mat
    way        0 -> 1 -> 3, new tokens: on the mat           two drafts accepted, and the bonus token
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.kernels import run_on

NOTHING = -1  # in place of a token that is not proposed


@dataclass
class Tree:
    """The shape of B trees of N nodes and the root; parents come before their children."""

    parents: Tensor  # int64 [B, N], of nodes 1 to N
    depths: Tensor  # int64 [B, N + 1]
    ancestors: Tensor  # bool [B, N + 1, N + 1], itself included
    depth: int  # of the deepest node, at most


@dataclass
class Proposal:
    """Draft tokens of B sequences."""

    tokens: Tensor  # int64 [B, N]
    tree: Tree | None = None  # None: a chain
    probabilities: Tensor | None = None  # float32 [B, N, V], what each was drawn from; None: none was drawn

    @property
    def depth(self) -> int:
        """Draft tokens that can be accepted."""
        return self.tokens.shape[1] if self.tree is None else self.tree.depth


@dataclass
class Way:
    """Where the verifier went, in B trees or chains of depth D."""

    nodes: Tensor  # int64 [B, D + 1], from node 0 on; the last one again beyond the end
    tokens: Tensor  # int64 [B, D + 1], chosen after each: accepted drafts and the bonus token
    accepted: Tensor  # int64 [B], drafts


def find_way(proposal: Proposal, choices: Tensor, kernels: bool = False) -> Way:
    """Go through what was proposed.

    Args:
        choices: int64 [B, N + 1], the token chosen after each node.
        kernels: on a GPU, let a Triton kernel go.
    """
    tokens, tree = proposal.tokens, proposal.tree
    if kernels and run_on(tokens.device):
        from ..models.kernels import decoding

        return Way(*decoding.find_way(tokens, tree.parents if tree else None, choices, proposal.depth))
    if tree is None:
        accepted = (tokens == choices[:, :-1]).long().cumprod(1).sum(1)
        steps = torch.arange(choices.shape[1], device=choices.device)
        nodes = torch.minimum(steps, accepted[:, None])
        return Way(nodes, choices.gather(1, nodes), accepted)
    node = torch.zeros_like(choices[:, :1])
    way = [node]
    going = torch.ones_like(node, dtype=torch.bool)
    accepted = torch.zeros_like(choices[:, 0])
    for _ in range(tree.depth):
        fits = (tree.parents == node) & (tokens == choices.gather(1, node))
        going = going & fits.any(1, keepdim=True)
        node = torch.where(going, fits.int().argmax(1, keepdim=True) + 1, node)
        way.append(node)
        accepted = accepted + going[:, 0]
    nodes = torch.cat(way, 1)
    return Way(nodes, choices.gather(1, nodes), accepted)


def grow_tree(scores: Tensor, tokens: Tensor, parents: Tensor, num_nodes: int, depth: int) -> tuple[Tensor, Tree]:
    """Keep the nodes of the highest scores, of equal ones the first.

    Args:
        scores: float32 [B, C], of a candidate never higher than its parent's.
        tokens: int64 [B, C].
        parents: int64 [B, C], candidates too, and before their children; -1 for those after the root.
        depth: of the deepest candidate.

    Returns:
        The tokens kept [B, num_nodes], and the tree that they are.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes]
    kept = order.sort(1).values
    above = parents.gather(1, kept)
    of_tree = torch.searchsorted(kept, above.clamp(min=0)) + 1
    of_tree = torch.where(above < 0, 0, of_tree)
    ancestors = torch.eye(num_nodes + 1, dtype=torch.bool, device=scores.device).expand(len(scores), -1, -1)
    itself = ancestors
    up = torch.nn.functional.pad(of_tree, (1, 0))[:, :, None].expand(-1, -1, num_nodes + 1)
    for _ in range(depth):
        ancestors = ancestors.gather(1, up) | itself
    return tokens.gather(1, kept), Tree(of_tree, ancestors.sum(2) - 1, ancestors, depth)
