"""The choice of a token by a row of logits or weights in Triton: the likeliest one, or one that is drawn.

The plain twin is `AcceptanceRule.choose` and `draw` of eval/decoding. A program walks its row in blocks: to find the
highest logit, to sum, and to find the first token up to which the sum is more than the number's share. Weights are of
float32, sums of float64, for 200,000 tokens. The second walk adds the same block sums in the same order as the first,
so the block that reaches the share is always found; in it no token without weight is chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _peak(row, num_columns, block: tl.constexpr):
    """Return the highest value of a row and the first of its places."""
    lane = tl.arange(0, block)
    highest = tl.full([block], float("-inf"), tl.float32)
    best = lane
    for start in range(0, num_columns, block):
        column = start + lane
        value = tl.load(row + column, mask=column < num_columns, other=float("-inf")).to(tl.float32)
        best = tl.where(value > highest, column, best)
        highest = tl.maximum(highest, value)
    peak = tl.max(highest, 0)
    return peak, tl.min(tl.where(highest == peak, best, num_columns), 0)


@triton.jit
def _weight(row, column, num_columns, peak, temperature, of_logits: tl.constexpr):
    """Return the weights of tokens: those that stand there, or by their logits, 1 at the peak."""
    inside = column < num_columns
    if of_logits:
        logit = tl.load(row + column, mask=inside, other=float("-inf")).to(tl.float32)
        return tl.exp(tl.div_rn(logit, temperature) - tl.div_rn(peak, temperature))
    return tl.load(row + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _rest(
    row, q, column, num_columns, peak, temperature, normaliser, of_logits: tl.constexpr, less: tl.constexpr
):  # fmt: skip
    """Return the weights of tokens; with `less`, normalised, what they have more than q."""
    weight = _weight(row, column, num_columns, peak, temperature, of_logits)
    if less:
        of_drafter = tl.load(q + column, mask=column < num_columns, other=0.0)
        weight = tl.maximum(tl.div_rn(weight, normaliser) - of_drafter, 0.0)
    return weight


@triton.jit
def _sum(
    row, q, num_columns, peak, temperature, normaliser,
    of_logits: tl.constexpr, less: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, block)
    total = tl.zeros([], tl.float64)
    for start in range(0, num_columns, block):
        weight = _rest(row, q, start + lane, num_columns, peak, temperature, normaliser, of_logits, less)
        total += tl.sum(weight.to(tl.float64), 0)
    return total


@triton.jit
def _find(
    row, q, share, num_columns, peak, temperature, normaliser,
    of_logits: tl.constexpr, less: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Return the first token up to which the weights sum to more than `share`."""
    lane = tl.arange(0, block)
    reached = tl.zeros([], tl.float64)
    token = tl.full([], -1, tl.int32)
    start = tl.zeros([], tl.int32)
    while (token < 0) & (start < num_columns):
        column = start + lane
        weight = _rest(row, q, column, num_columns, peak, temperature, normaliser, of_logits, less)
        wide = weight.to(tl.float64)
        after = reached + tl.sum(wide, 0)
        if after > share:
            first = tl.min(tl.where((weight > 0) & (reached + tl.cumsum(wide, 0) > share), column, num_columns), 0)
            last = tl.max(tl.where(weight > 0, column, 0), 0)  # where the running sum is rounded to less than the sum
            token = tl.minimum(first, last)
        reached = after
        start += block
    return tl.where(token < 0, num_columns - 1, token)  # logits that are no numbers


@triton.jit
def choose_kernel(
    rows, drafts, q, accept, choose, out, num_columns, num_nodes, num_between, temperature,
    of_logits: tl.constexpr, greedy: tl.constexpr, drawn: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Choose a token by one row; `drawn`: the drafts of all nodes but the last of `num_nodes` were drawn from q."""
    at = tl.program_id(0).to(tl.int64)
    row = rows + at * num_columns
    out += at
    peak = tl.zeros([], tl.float32)
    if of_logits:
        peak, likeliest = _peak(row, num_columns, block)
    if greedy:
        tl.store(out, likeliest.to(tl.int64))
    else:
        total = _sum(row, q, num_columns, peak, temperature, 1.0, of_logits, False, block)
        number = tl.load(choose + at * num_between)
        token = tl.full([], -1, tl.int32)
        if drawn:
            node = at % num_nodes
            draft_at = at // num_nodes * (num_nodes - 1) + node
            q += draft_at * num_columns
            normaliser = total.to(tl.float32) if of_logits else 1.0
            if node < num_nodes - 1:
                draft = tl.load(drafts + draft_at).to(tl.int32)
                p = tl.div_rn(_weight(row, draft, num_columns, peak, temperature, of_logits), normaliser)
                if tl.load(accept + at * num_between) * tl.load(q + draft).to(tl.float64) < p.to(tl.float64):
                    token = draft
                else:
                    rest = _sum(row, q, num_columns, peak, temperature, normaliser, of_logits, True, block)
                    if rest > 0:  # or rounding leaves nothing
                        share = number * rest
                        token = _find(row, q, share, num_columns, peak, temperature, normaliser, of_logits, True, block)
        if token < 0:
            token = _find(row, q, number * total, num_columns, peak, temperature, 1.0, of_logits, False, block)
        tl.store(out, token.to(tl.int64))


BLOCK, NUM_WARPS = 4096, 8  # columns at a time; reckoned, not measured


def _choose(
    rows: Tensor, temperature: float | None, block: int, choose: Tensor | None = None, *drawn: Tensor
) -> Tensor:
    flat = rows.flatten(0, -2).contiguous()
    out = torch.empty(len(flat), dtype=torch.int64, device=rows.device)
    drafts, q, accept = drawn or (flat, flat, out)  # never read
    accept, choose = accept.flatten(), out if choose is None else choose.flatten()
    assert not drawn or accept.stride() == choose.stride()
    with torch.cuda.device_of(flat):
        choose_kernel[(len(flat),)](
            flat, drafts.contiguous(), q.contiguous(), accept, choose, out, flat.shape[1], rows.shape[-2],
            choose.stride(0), 1.0 if temperature is None else temperature, of_logits=temperature is not None,
            greedy=temperature == 0, drawn=bool(drawn), block=block, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out.view(rows.shape[:-1])


def likeliest(logits: Tensor, block: int = BLOCK) -> Tensor:
    """Return the token of the highest logit, of equal ones the first: int64 [...] by logits [..., V]."""
    return _choose(logits, 0.0, block)


def draw(rows: Tensor, numbers: Tensor, temperature: float | None = None, block: int = BLOCK) -> Tensor:
    """Draw tokens int64 [...] by logits at this temperature, or weights, [..., V] and uniform numbers float64 [...]."""
    return _choose(rows, temperature, block, numbers)


def draw_or_accept(
    rows: Tensor, drafts: Tensor, q: Tensor, accept: Tensor, choose: Tensor, temperature: float | None = None
) -> Tensor:
    """Accept drafts that were drawn, or draw from what p has more than q: int64 [B, N + 1].

    Args:
        rows: [B, N + 1, V], logits of p at this temperature; p itself if it is None.
        drafts: int64 [B, N], drawn from q, float32 [B, N, V].
        accept, choose: float64 [B, N + 1], uniform in [0, 1).
    """
    return _choose(rows, temperature, BLOCK, choose, drafts, q, accept)
