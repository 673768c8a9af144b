"""Comparisons of decoding's Triton kernels with their plain twins: for runs, and for tests in the interpreter."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ...conf.schema import EvaluateConfig
from ...models.head.config import DraftHeadConfig
from ...models.kernels import DECODING
from ...models.kernels.self_check import TOLERANCES, Check, Checked, Figure, check_kernels
from ...models.verifier.cache import SlotCache
from .acceptance import AcceptanceRule
from .proposal import Proposal, accepted_path, grow_tree

_ROWS = 24  # of logits, in a case
_TOKENS = 3  # of a case's vocabulary: siblings may be alike
_NEARLY_ONE = 1 - 2.0**-53  # the highest number there is
_Device = torch.device | str


def check_decoding(options: EvaluateConfig, head: DraftHeadConfig, dtype: torch.dtype, device: torch.device) -> Checked:
    """Check the kernels that an evaluation may use, in its shapes and dtype."""
    rule, is_tree = AcceptanceRule.of(options), options.tree_depth is not None
    checks = decoding_checks(rule, head, options.num_draft_tokens, is_tree, dtype, device)
    return check_kernels("evaluate.kernels", options.kernels, device, checks)


def decoding_checks(
    rule: AcceptanceRule,
    head: DraftHeadConfig,
    num_draft_tokens: int,
    is_tree: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Check]:
    """Return the comparisons of the kernels that this decoding uses; but for rounding, nothing may differ."""

    def compare_join() -> dict[str, Figure]:
        errors = [joined_error(rows, head.hidden_size, dtype, device) for rows in (1, 9)]
        return {"input": Figure(torch.tensor(errors).max().item(), TOLERANCES[dtype])}

    def compare_choice() -> dict[str, Figure]:
        case = head.vocab_size, dtype, device
        if not rule.temperature:
            return {"greedy tokens": Figure(_count_other_likeliest(*case), 0)}
        figures = {"drawn tokens": Figure(count_other_draws(_ROWS, *case, rule)[1], 0)}
        if rule.draws_drafts:
            wrong = count_other_choices(3, num_draft_tokens, *case, rule, 0.6)[1]
            figures["drafts accepted or replaced"] = Figure(wrong, 0)
            of_weights = replace(rule, top_k=head.vocab_size)  # by probabilities, as drafts are drawn, not by logits
            figures["draft tokens"] = Figure(count_other_draws(_ROWS, *case, of_weights)[1], 0)
        return figures

    def choices(*kinds: str) -> list[tuple[Proposal, Tensor]]:
        proposal = (random_tree if is_tree else chain)(16, num_draft_tokens, device)
        return [(proposal, choices_for(proposal, kind)) for kind in kinds]

    def compare_path() -> dict[str, Figure]:
        return {"steps": Figure(sum(count_other_steps(*case) for case in choices("all", "none", "some")), 0)}

    def compare_move() -> dict[str, Figure]:
        cache = head.num_key_value_heads, head.head_dim, dtype  # as the verifier's, of which the head is made
        paths = [accepted_path(*case).nodes for case in choices("all", "some")]
        return {"slots": Figure(sum(count_other_slots(nodes, *cache) for nodes in paths), 0)}

    checks = [Check("join", compare_join), Check("choose", compare_choice), Check("way", compare_path)]
    return [*checks, Check("move", compare_move)] if is_tree else checks


def _both(rule: AcceptanceRule, *inputs: Any) -> tuple[Tensor, Tensor]:
    """Choose tokens by the kernel and by its twin."""
    kernel, twin = (replace(rule, kernels=kernels).choose(*inputs) for kernels in (DECODING, frozenset[str]()))
    return kernel, twin


def joined_error(num_rows: int, width: int, dtype: torch.dtype, device: _Device) -> float:
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


def _is_within(tokens: Tensor, weights: Tensor, numbers: Tensor, tolerance: float | Tensor) -> Tensor:
    """Return whether the numbers draw these tokens by weights [..., V], up to a share of the whole."""
    weights = weights.double()
    shares = weights / weights.sum(-1, keepdim=True)
    sums, own = (values.gather(-1, tokens[..., None])[..., 0] for values in (shares.cumsum(-1), shares))
    return (own > 0) & (sums - own - tolerance <= numbers) & (numbers <= sums + tolerance)


def _count_other_likeliest(width: int, dtype: torch.dtype, device: _Device) -> int:
    """Choose greedily by rows with many equal logits; return how often kernel and definition differ."""
    logits = torch.randint(-3, 4, (3, 8, width), generator=torch.Generator().manual_seed(0)).to(dtype)
    rule = AcceptanceRule(kernels=DECODING)
    choices = rule.choose(logits.to(device), chain(3, 0, device), torch.empty(0)).cpu()
    return int((choices != logits.float().argmax(-1)).sum())


def count_other_draws(
    rows: int, width: int, dtype: torch.dtype, device: _Device, rule: AcceptanceRule
) -> tuple[int, int]:
    """Draw by rows of logits, by kernel and twin.

    Return how often they differ, as they may where rounding can tell, and how often the kernel's are wrong.
    """
    generator = torch.Generator().manual_seed(0)
    logits = (3.0 * torch.randn(1, rows, width, generator=generator)).to(device, dtype)
    draws = torch.rand(1, rows, 3, dtype=torch.float64, generator=generator)
    draws[:, :4, 2] = torch.tensor([0.0, _NEARLY_ONE, 1e-12, 1 - 1e-12], dtype=torch.float64)
    draws = draws.to(device)
    logits[:, :, [0, -1]] = -torch.inf  # tokens without weight at both ends
    kernel, twin = _both(rule, logits, chain(1, 0, device), draws)
    right = _is_within(kernel, rule.probabilities(logits), draws[..., 2], 1e-6)
    return int((kernel != twin).sum()), int((~right).sum())


def count_other_choices(
    sequences: int, drafts: int, width: int, dtype: torch.dtype, device: _Device, rule: AcceptanceRule, likeness: float
) -> tuple[int, int, float]:
    """Accept drawn drafts or draw anew, by kernel and twin; `likeness` 1: drafter and verifier are the same.

    Return how often they differ, as they may where rounding can tell; how often the kernel's are wrong; and the share
    of drafts that the twin accepts.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(sequences, drafts + 1, width, generator=generator)
    of_drafter = logits[:, :-1] * likeness + 3 * (1 - likeness) * torch.randn(logits[:, :-1].shape, generator=generator)
    q = rule.probabilities(of_drafter.to(dtype)).to(device)
    tokens = q.flatten(0, 1).cpu().multinomial(1, generator=generator).view(sequences, drafts).to(device)
    draws = torch.rand(sequences, drafts + 1, 3, dtype=torch.float64, generator=generator).to(device)
    logits, proposal = logits.to(device, dtype), Proposal(tokens, probabilities=q)
    kernel, twin = _both(rule, logits, proposal, draws)
    p = rule.probabilities(logits)
    of_p, of_q = (values.gather(2, tokens[..., None])[..., 0].double() for values in (p[:, :-1], q))
    accept = draws[:, :-1, 1] * of_q
    passed = (accept < of_p * (1 + 1e-5)) & (kernel[:, :-1] == tokens)
    rest = (p[:, :-1].double() - q.double()).clamp(min=0)
    left = rest.sum(-1)
    residual = torch.where(left[..., None] > 0, rest, p[:, :-1].double())
    tolerance = 1e-5 / left.clamp(min=1e-5)  # of a difference of two numbers that are rounded
    drawn = (accept > of_p * (1 - 1e-5)) & _is_within(kernel[:, :-1], residual, draws[:, :-1, 2], tolerance)
    wrong = (~(passed | drawn)).sum() + (~_is_within(kernel[:, -1], p[:, -1], draws[:, -1, 2], 1e-6)).sum()
    return int((kernel != twin).sum()), int(wrong), float((twin[:, :-1] == tokens).float().mean())


def random_tree(sequences: int, num_nodes: int, device: _Device) -> Proposal:
    """Return random trees."""
    generator = torch.Generator().manual_seed(num_nodes)
    steps = torch.arange(num_nodes)
    parents = (torch.rand(sequences, num_nodes, generator=generator) * (steps + 1)).long() - 1  # -1 to the one before
    tokens = torch.randint(0, _TOKENS, parents.shape, generator=generator)
    scores, tokens, parents = (values.to(device) for values in (-steps.float().expand_as(parents), tokens, parents))
    tokens, tree = grow_tree(scores, tokens, parents, num_nodes, num_nodes)
    return Proposal(tokens, replace(tree, depth=int(tree.depths.max())))


def chain(sequences: int, num_tokens: int, device: _Device) -> Proposal:
    """Return random chains."""
    generator = torch.Generator().manual_seed(num_tokens)
    return Proposal(torch.randint(0, _TOKENS, (sequences, num_tokens), generator=generator).to(device))


def choices_for(proposal: Proposal, kind: str) -> Tensor:
    """Choose tokens after the nodes: a child's everywhere ("all"), no child's ("none") or any ("some")."""
    tokens = proposal.tokens
    choices = torch.full((len(tokens), tokens.shape[1] + 1), _TOKENS, device=tokens.device)
    if kind == "some":
        return torch.randint(0, _TOKENS, choices.shape, generator=torch.Generator().manual_seed(1)).to(tokens.device)
    if kind == "all":
        steps = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        choices.scatter_(1, steps if proposal.tree is None else proposal.tree.parents, tokens)
    return choices


def _count_unequal(pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
    return sum(int((one != other).sum()) for one, other in pairs)


def count_other_steps(proposal: Proposal, choices: Tensor) -> int:
    """Return in how many numbers the paths of kernel and twin differ."""
    kernel, twin = (vars(accepted_path(proposal, choices, kernels)).values() for kernels in (True, False))
    return _count_unequal(zip(kernel, twin, strict=True))


def count_other_slots(nodes: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bring the slots of paths together in caches of 3 layers; return in how many numbers kernel and twin differ."""
    generator = torch.Generator().manual_seed(0)
    sequences, num_nodes = nodes.shape
    like = DynamicCache()
    for layer in range(3):
        shape = (1, heads, 1, head_dim) if layer else (1, 1, 1, 40)  # of two shapes
        like.update(*torch.zeros(2, *shape, dtype=dtype, device=nodes.device), layer)
    lengths = torch.randint(0, 30, (sequences, 1), generator=generator).to(nodes.device)
    targets = lengths + torch.arange(num_nodes, device=nodes.device)
    kernel, twin = (SlotCache(like, sequences, 30 + int(nodes.max()) + num_nodes + 1) for _ in range(2))
    for one, other in zip(kernel.tensors, twin.tensors, strict=True):
        other.copy_(one.copy_(torch.randn(one.shape, generator=generator)))
    kernel.move(lengths + nodes, targets, kernels=True)
    twin.move(lengths + nodes, targets)
    return _count_unequal(zip(kernel.tensors, twin.tensors, strict=True))
