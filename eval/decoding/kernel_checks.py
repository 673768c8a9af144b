"""The Triton kernels of speculative decoding beside their plain twins: for runs, and for tests in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...conf.schema import Config
from ...models.head.config import DraftHeadConfig
from ...models.kernels import DECODING
from ...models.kernels.self_check import TOLERANCES, Check, Checked, Figure, check_kernels
from .acceptance import AcceptanceRule
from .proposal import Proposal, find_way, grow_tree
from .verifier_cache import SlotCache

NEARLY_ONE = 1 - 2.0**-53  # the highest number there is
_ROWS = 24  # of logits, in a case


class DecodingShape(NamedTuple):
    """What the cases are made like."""

    rule: AcceptanceRule
    head: DraftHeadConfig
    num_draft_tokens: int
    is_tree: bool
    dtype: torch.dtype
    device: torch.device


def check_decoding(config: Config, head: DraftHeadConfig, device: torch.device) -> Checked:
    """Check the kernels that an evaluation may use, in its shapes and dtype."""
    options, dtype = config.evaluate, getattr(torch, config.verifier.dtype.value)
    is_tree = options.tree_depth is not None
    shape = DecodingShape(AcceptanceRule.of(options), head, options.num_draft_tokens, is_tree, dtype, device)
    return check_kernels("evaluate.kernels", options.kernels, device, decoding_checks(shape))


def decoding_checks(shape: DecodingShape) -> list[Check]:
    """Return the comparisons of the kernels that this decoding uses."""
    compare = {"join": compare_join, "choose": compare_choice, "way": compare_way, "move": compare_move}
    return [Check(name, partial(of, shape)) for name, of in compare.items() if name != "move" or shape.is_tree]


def compare_join(shape: DecodingShape) -> dict[str, Figure]:
    """Compare the input of a draft step, of one row and of many."""
    errors = [joined_error(rows, shape.head.hidden_size, shape.dtype, shape.device) for rows in (1, 9)]
    return {"input": Figure(torch.tensor(errors).max().item(), TOLERANCES[shape.dtype])}


def compare_choice(shape: DecodingShape) -> dict[str, Figure]:
    """Compare the choice of tokens by the verifier's logits, and of draft tokens if they are drawn; none may differ."""
    rule, width, dtype, device = shape.rule, shape.head.vocab_size, shape.dtype, shape.device
    if not rule.temperature:
        return {"greedy tokens": Figure(count_other_likeliest(width, dtype, device), 0)}
    found = {"drawn tokens": Figure(count_other_draws(_ROWS, width, dtype, device, rule)[1], 0)}
    if rule.draws_drafts:
        _, astray, _ = count_other_choices(3, shape.num_draft_tokens, width, dtype, device, rule, 0.6)
        found["drafts accepted or replaced"] = Figure(astray, 0)
        of_weights = replace(rule, top_k=width)  # by probabilities, as draft tokens are drawn, not by logits
        found["draft tokens"] = Figure(count_other_draws(_ROWS, width, dtype, device, of_weights)[1], 0)
    return found


def compare_way(shape: DecodingShape) -> dict[str, Figure]:
    """Compare the way through proposals of which all, none or some are accepted; nothing may differ."""
    proposal = _proposal(shape)
    differ = [count_other_steps(proposal, choices_for(proposal, kind, 3)) for kind in ("all", "none", "some")]
    return {"steps": Figure(sum(differ), 0)}


def compare_move(shape: DecodingShape) -> dict[str, Figure]:
    """Compare how the slots of a tree's way are brought together; no number may differ."""
    proposal = _proposal(shape)
    nodes = [find_way(proposal, choices_for(proposal, kind, 3)).nodes for kind in ("all", "some")]
    cache = shape.head.num_key_value_heads, shape.head.head_dim  # as the verifier's, of which the head is made
    return {"slots": Figure(sum(count_other_slots(way, *cache, shape.dtype) for way in nodes), 0)}


def _proposal(shape: DecodingShape) -> Proposal:
    make: Callable[[int, int, torch.device | str, int], Proposal] = random_tree if shape.is_tree else chain
    return make(16, shape.num_draft_tokens, shape.device, 3)


def _both(rule: AcceptanceRule, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Choose tokens by the kernel and by its twin."""
    found, expected = (replace(rule, kernels=kernels).choose(*inputs) for kernels in (DECODING, frozenset[str]()))
    return found, expected


def joined_error(num_rows: int, width: int, dtype: torch.dtype, device: torch.device | str) -> float:
    """Return the largest error of [norm(embedding), norm(state)]; rows of the state may lie over each other."""
    from ...models.kernels.decoding import join_inputs

    generator = torch.Generator().manual_seed(0)
    embedding, state = (3 * torch.randn(11, width, generator=generator).to(device, dtype) for _ in range(2))
    state = state[:1].expand(num_rows, -1) if num_rows < 3 else state.repeat(num_rows, 1)[:num_rows]
    tokens = torch.randint(0, 11, (num_rows,), generator=generator).to(device)
    norms = [nn.RMSNorm(width, eps) for eps in (1e-5, 1e-2)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.3, generator)
        norm.to(device, dtype)
    found = join_inputs(tokens, embedding, state, *norms)
    assert found.dtype == dtype
    exact = [norm.double()(x.double()) for norm, x in zip(norms, (embedding[tokens], state), strict=True)]
    return float((found - torch.cat(exact, 1)).detach().abs().max())


def is_within(tokens: Tensor, weights: Tensor, numbers: Tensor, tolerance: float | Tensor) -> Tensor:
    """Tell of tokens whether the numbers draw them by weights [..., V], up to a share of the whole."""
    weights = weights.double()
    sums = (weights / weights.sum(-1, keepdim=True)).cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    own = (weights / weights.sum(-1, keepdim=True)).gather(-1, tokens[..., None])[..., 0]
    return (own > 0) & (sums - own - tolerance <= numbers) & (numbers <= sums + tolerance)


def count_other_likeliest(width: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """Choose greedily by rows with many equal logits; return how often kernel and definition differ."""
    logits = torch.randint(-3, 4, (3, 8, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    found = AcceptanceRule(kernels=DECODING).choose(logits.to(device), nothing(3, device), torch.empty(0)).cpu()
    return int((found != logits.float().argmax(-1)).sum())


def count_other_draws(
    rows: int, width: int, dtype: torch.dtype, device: torch.device | str, rule: AcceptanceRule, sharpness: float = 3.0
) -> tuple[int, int]:
    """Draw by rows of logits, by the kernel and by the twin.

    Returns:
        How often they differ, as they may where rounding can tell, and how often the kernel's are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (sharpness * torch.randn(1, rows, width, generator=generator)).to(device, dtype)
    draws = torch.rand(1, rows, 3, dtype=torch.float64, generator=generator)
    draws[:, :4, 2] = torch.tensor([0.0, NEARLY_ONE, 1e-12, 1 - 1e-12], dtype=torch.float64)
    draws = draws.to(device)
    logits[:, :, [0, -1]] = -torch.inf  # tokens without weight at both ends
    found, expected = _both(rule, logits, nothing(1, device), draws)
    right = is_within(found, rule.probabilities(logits), draws[..., 2], 1e-6)
    return int((found != expected).sum()), int((~right).sum())


def count_other_choices(
    sequences: int,
    drafts: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str,
    rule: AcceptanceRule,
    likeness: float,
) -> tuple[int, int, float]:
    """Accept drawn drafts or draw anew, by the kernel and by the twin.

    Args:
        likeness: of the drafter and the verifier, 1 where they are the same.

    Returns:
        How often they differ, as they may where rounding can tell; how often the kernel's are wrong; and the share of
        drafts that the twin accepts.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(sequences, drafts + 1, width, generator=generator)
    of_drafter = logits[:, :-1] * likeness + 3 * (1 - likeness) * torch.randn(logits[:, :-1].shape, generator=generator)
    q = rule.probabilities(of_drafter.to(dtype)).to(device)
    tokens = q.flatten(0, 1).cpu().multinomial(1, generator=generator).view(sequences, drafts).to(device)
    draws = torch.rand(sequences, drafts + 1, 3, dtype=torch.float64, generator=generator).to(device)
    logits, proposal = logits.to(device, dtype), Proposal(tokens, probabilities=q)
    found, expected = _both(rule, logits, proposal, draws)
    p = rule.probabilities(logits)
    of_p, of_q = (values.gather(2, tokens[..., None])[..., 0].double() for values in (p[:, :-1], q))
    accept = draws[:, :-1, 1] * of_q
    passed = (accept < of_p * (1 + 1e-5)) & (found[:, :-1] == tokens)
    rest = (p[:, :-1].double() - q.double()).clamp(min=0)
    left = rest.sum(-1)
    residual = torch.where(left[..., None] > 0, rest, p[:, :-1].double())
    tolerance = 1e-5 / left.clamp(min=1e-5)  # of a difference of two numbers that are rounded
    drawn = (accept > of_p * (1 - 1e-5)) & is_within(found[:, :-1], residual, draws[:, :-1, 2], tolerance)
    wrong = (~(passed | drawn)).sum() + (~is_within(found[:, -1], p[:, -1], draws[:, -1, 2], 1e-6)).sum()
    return int((found != expected).sum()), int(wrong), float((expected[:, :-1] == tokens).float().mean())


def nothing(sequences: int, device: torch.device | str) -> Proposal:
    """Return a proposal of no tokens."""
    return Proposal(torch.zeros(sequences, 0, dtype=torch.int64, device=device))


def random_tree(sequences: int, num_nodes: int, device: torch.device | str, alike: int) -> Proposal:
    """Return trees of the best of twice as many random candidates, of few tokens: siblings may be alike."""
    generator = torch.Generator().manual_seed(num_nodes)
    count = 2 * num_nodes
    parents = torch.stack([torch.randint(-1, max(1, i), (sequences,), generator=generator) for i in range(count)], 1)
    parents[:, 0] = -1
    scores, depths = torch.zeros(sequences, count), torch.ones(sequences, count, dtype=torch.int64)
    rows = torch.arange(sequences)
    for i in range(count):
        above = parents[:, i]
        fall = torch.rand(sequences, generator=generator)
        scores[:, i] = torch.where(above < 0, 0.0, scores[rows, above]) - fall
        depths[:, i] = torch.where(above < 0, 0, depths[rows, above]) + 1
    tokens = torch.randint(0, alike, (sequences, count), generator=generator)
    tokens, scores, parents = (values.to(device) for values in (tokens, scores, parents))
    return Proposal(*grow_tree(scores, tokens, parents, num_nodes, int(depths.max())))


def chain(sequences: int, num_tokens: int, device: torch.device | str, alike: int) -> Proposal:
    """Return chains of few tokens."""
    generator = torch.Generator().manual_seed(num_tokens)
    return Proposal(torch.randint(0, alike, (sequences, num_tokens), generator=generator).to(device))


def choices_for(proposal: Proposal, kind: str, alike: int) -> Tensor:
    """Choose tokens after the nodes: a child's everywhere ("all"), no child's ("none") or any ("some")."""
    tokens = proposal.tokens
    choices = torch.full((len(tokens), tokens.shape[1] + 1), alike, device=tokens.device)
    if kind == "some":
        return torch.randint(0, alike, choices.shape, generator=torch.Generator().manual_seed(1)).to(tokens.device)
    if kind == "all":
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        parents = steps if proposal.tree is None else proposal.tree.parents
        choices.scatter_(1, parents, tokens)
    return choices


def count_other_steps(proposal: Proposal, choices: Tensor) -> int:
    """Return in how many numbers the ways of kernel and twin differ."""
    found, expected = (find_way(proposal, choices, kernels) for kernels in (True, False))
    pairs = zip(vars(found).values(), vars(expected).values(), strict=True)
    return sum(int((one != other).sum()) for one, other in pairs)


def count_other_slots(nodes: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bring the slots of ways together in caches of 3 layers; return in how many numbers kernel and twin differ."""
    generator = torch.Generator().manual_seed(0)
    sequences, num_nodes = nodes.shape
    like = DynamicCache()
    for layer in range(3):
        shape = (1, heads, 1, head_dim) if layer else (1, 1, 1, 40)  # of two shapes
        like.update(*torch.zeros(2, *shape, dtype=dtype, device=nodes.device), layer)
    lengths = torch.randint(0, 30, (sequences,), generator=generator).to(nodes.device)
    slots = 30 + int(nodes.max()) + num_nodes + 1
    caches = [SlotCache(like, sequences, slots) for _ in range(2)]
    for held in zip(*(cache.tensors for cache in caches), strict=True):
        values = torch.randn(held[0].shape, generator=generator)
        for one in held:
            one.copy_(values)
    targets = lengths[:, None] + torch.arange(num_nodes, device=nodes.device)
    for cache, kernels in zip(caches, (True, False), strict=True):
        cache.move(lengths[:, None] + nodes, targets, kernels)
    pairs = zip(*(cache.tensors for cache in caches), strict=True)
    return sum(int((one != other).sum()) for one, other in pairs)
