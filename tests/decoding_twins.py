"""The kernels of speculative decoding beside their plain twins, for the interpreter (CPU) and for a GPU alike.

Needs torch, transformers and triton alone.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from fledge.eval.acceptance import AcceptanceRule
from fledge.eval.benchmark import Options, make_models
from fledge.eval.cached_verifier import SlotCache
from fledge.eval.draft_decoder import DraftDecoder
from fledge.eval.prompt_lookup import NoDraft
from fledge.eval.proposal import Proposal, find_way, grow_tree
from fledge.eval.speculative import Decoded, Request, Speculator
from torch import Tensor, nn
from transformers import DynamicCache

NEARLY_ONE = 1 - 2.0**-53  # the highest number there is


def joined_error(num_rows: int, width: int, dtype: torch.dtype, device: str) -> float:
    """Give the largest error of [norm(embedding), norm(state)]; rows of the state may lie over each other."""
    from fledge.models.kernels.decoding import join_inputs

    generator = torch.Generator().manual_seed(0)
    embedding, state = (3 * torch.randn(11, width, generator=generator).to(device, dtype) for _ in range(2))
    state = state[:1].expand(num_rows, -1) if num_rows < 3 else state.repeat(num_rows, 1)[:num_rows]
    tokens = torch.randint(0, 11, (num_rows,), generator=generator).to(device)
    norms = [nn.RMSNorm(width, eps).to(device, dtype) for eps in (1e-5, 1e-2)]
    for norm in norms:
        nn.init.normal_(norm.weight, 1, 0.3)
    found = join_inputs(tokens, embedding, state, *norms)
    assert found.dtype == dtype
    exact = [norm.double()(x.double()) for norm, x in zip(norms, (embedding[tokens], state), strict=True)]
    return float((found - torch.cat(exact, 1)).detach().abs().max())


def is_within(tokens: Tensor, weights: Tensor, numbers: Tensor, tolerance: float) -> Tensor:
    """Tell of tokens whether the numbers draw them by weights [..., V], up to a share of the whole."""
    weights = weights.double()
    sums = (weights / weights.sum(-1, keepdim=True)).cumsum(-1).gather(-1, tokens[..., None])[..., 0]
    own = (weights / weights.sum(-1, keepdim=True)).gather(-1, tokens[..., None])[..., 0]
    return (own > 0) & (sums - own - tolerance <= numbers) & (numbers <= sums + tolerance)


def count_other_draws(
    rows: int, width: int, dtype: torch.dtype, device: str, rule: AcceptanceRule, sharpness: float = 3.0
) -> int:
    """Draw by rows of logits, by the kernel and by the twin; give how often they differ, where rounding can tell."""
    generator = torch.Generator().manual_seed(0)
    logits = (sharpness * torch.randn(1, rows, width, generator=generator)).to(device, dtype)
    draws = torch.rand(1, rows, 3, dtype=torch.float64, generator=generator).to(device)
    draws[:, :4, 2] = torch.tensor([0.0, NEARLY_ONE, 1e-12, 1 - 1e-12], dtype=torch.float64)
    logits[:, :, [0, -1]] = -torch.inf  # tokens without weight at both ends
    nothing = Proposal(torch.zeros(1, 0, dtype=torch.int64, device=device))
    found, expected = (replace(rule, kernels=k).choose(logits, nothing, draws) for k in (True, False))
    assert is_within(found, rule.probabilities(logits), draws[..., 2], 1e-6).all()
    return int((found != expected).sum())


def count_other_choices(
    sequences: int, drafts: int, width: int, dtype: torch.dtype, device: str, rule: AcceptanceRule, likeness: float
) -> tuple[int, float]:
    """Accept drawn drafts or draw anew, by the kernel and by the twin.

    Args:
        likeness: of the drafter and the verifier, 1 where they are the same.

    Returns:
        How often they differ, where rounding can tell, and the share of drafts that was accepted.
    """
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(sequences, drafts + 1, width, generator=generator)
    of_drafter = logits[:, :-1] * likeness + 3 * (1 - likeness) * torch.randn(logits[:, :-1].shape, generator=generator)
    q = rule.probabilities(of_drafter.to(dtype)).to(device)
    tokens = q.flatten(0, 1).cpu().multinomial(1, generator=generator).view(sequences, drafts).to(device)
    draws = torch.rand(sequences, drafts + 1, 3, dtype=torch.float64, generator=generator).to(device)
    logits, proposal = logits.to(device, dtype), Proposal(tokens, probabilities=q)
    found, expected = (replace(rule, kernels=k).choose(logits, proposal, draws) for k in (True, False))
    p = rule.probabilities(logits)
    of_p, of_q = (values[:, :-1].gather(2, tokens[..., None])[..., 0].double() for values in (p, proposal_q(q)))
    accept = draws[:, :-1, 1] * of_q
    passed = (accept < of_p * (1 + 1e-5)) & (found[:, :-1] == tokens)
    rest = (p[:, :-1].double() - q.double()).clamp(min=0)
    left = rest.sum(-1)
    residual = torch.where(left[..., None] > 0, rest, p[:, :-1].double())
    tolerance = 1e-5 / left.clamp(min=1e-5)  # of a difference of two numbers that are rounded
    drawn = (accept > of_p * (1 - 1e-5)) & is_within(found[:, :-1], residual, draws[:, :-1, 2], tolerance)
    assert (passed | drawn).all()
    assert is_within(found[:, -1], p[:, -1], draws[:, -1, 2], 1e-6).all()
    return int((found != expected).sum()), float((expected[:, :-1] == tokens).float().mean())


def proposal_q(q: Tensor) -> Tensor:
    """Give q with a row for the node after the last draft, as `choose` has it."""
    return nn.functional.pad(q, (0, 0, 0, 1))


def random_tree(sequences: int, num_nodes: int, device: str, alike: int) -> Proposal:
    """Give trees of the best of twice as many random candidates, of few tokens: siblings may be alike."""
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


def chain(sequences: int, num_tokens: int, device: str, alike: int) -> Proposal:
    """Give chains of few tokens."""
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


def check_way(proposal: Proposal, choices: Tensor) -> int:
    """Check that kernel and twin go the same way, and bring its slots together alike; give the drafts accepted."""
    found, expected = (find_way(proposal, choices, kernels) for kernels in (True, False))
    for name in ("nodes", "tokens", "accepted"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    return int(expected.accepted.sum())


def check_moved(nodes: Tensor, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Check that the slots of ways are brought together in caches of 3 layers as by the twin."""
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
    assert all(torch.equal(*held) for held in zip(*(cache.tensors for cache in caches), strict=True))


# -- the whole loop ----------------------------------------------------------------------------------------------------

SHAPES = {"chain": (4,), "tree": (12, 4, 4)}
SMALL = Options(
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=40,
    draft_vocab_size=30,
)


class Loop:
    """A small random verifier and head, and prompts of several lengths."""

    def __init__(self, device: str = "cpu", dtype: str = "float32", max_tokens: int = 24) -> None:
        self.max_tokens = max_tokens
        self.verifier, self.head = make_models(replace(SMALL, device=device, dtype=dtype))
        with torch.no_grad():
            self.verifier.model.lm_head.weight.mul_(20)  # sharper than chance
        self.embedding = self.verifier.model.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        self.prompts = [torch.randint(40, (n,), generator=generator).tolist() for n in (9, 4, 17)]

    def speculator(self, shape: str, rule: AcceptanceRule, **options: bool) -> tuple[Speculator, DraftDecoder]:
        """Give a speculator that has read the prompts, and its drafter."""
        rule = replace(rule, kernels=options.pop("kernels", False))
        num_tokens, *tree = SHAPES[shape]
        drafter = DraftDecoder(self.head, self.embedding, num_tokens, *(tree or [None, 1]), rule, len(self.prompts))
        speculator = Speculator(self.verifier, [drafter], rule, len(self.prompts), **options)
        speculator.prefill([Request(prompt, self.max_tokens, str(n)) for n, prompt in enumerate(self.prompts)])
        return speculator, drafter

    def answers(self, shape: str, rule: AcceptanceRule, **options: bool) -> tuple[list[Decoded], list[Decoded]]:
        """Answer with a draft head, and by the verifier alone."""
        speculator, drafter = self.speculator(shape, rule, **options)
        return speculator.decode(drafter), speculator.decode(NoDraft())
