"""Attention of the training-time-test unroll in Triton (docs/internals/split_attention.md derives the formulas).

A query carries its own bounds: of step 0's keys it sees those from `first`, the first row of its document or of its
window, to its own `row`. A tile of queries walks the blocks of keys from its smallest `first` to its largest `row`,
each query masked by its own bounds. The keys of its later steps, gathered next to the query, join the same softmax.

A tile holds *pairs* of a query and one of the heads that share a kv head: pair i is query i // group and head i % group
of the kv head's group. Pairs beyond the last one repeat it: they write the same values to the same place.

Scores and log-sum-exps are in bits (base 2), as `exp2` is what the hardware has. Sums are in float32. No atomics: the
gradients are the same in every run.
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(pointer, offsets, head_dim: tl.constexpr, width: tl.constexpr):
    """Load the vectors [rows, width] that begin at `offsets`, zeros beyond head_dim."""
    column = tl.arange(0, width)[None, :]
    return tl.load(pointer + offsets[:, None] + column, mask=column < head_dim, other=0.0)


@triton.jit
def _store_rows(pointer, offsets, values, head_dim: tl.constexpr, width: tl.constexpr):
    column = tl.arange(0, width)[None, :]
    tl.store(pointer + offsets[:, None] + column, values.to(pointer.dtype.element_ty), mask=column < head_dim)


@triton.jit
def _pairs(start, end, tile: tl.constexpr, group: tl.constexpr):
    """Return the queries [tile] of the pairs from `start` on, and where their head lies in an array [n, heads]."""
    pair = tl.minimum(start + tl.arange(0, tile), end - 1)
    query = pair // group
    heads = tl.num_programs(1) * group
    return query, query.to(tl.int64) * heads + tl.program_id(1) * group + pair % group


@triton.jit
def _key_offsets(start, num_keys, block: tl.constexpr, head_dim: tl.constexpr):
    """Return the rows [block] of keys from `start` on, and where they begin in an array [T, kv_heads, D]."""
    key = start + tl.arange(0, block)
    inside = tl.minimum(key, num_keys - 1).to(tl.int64)
    return key, (inside * tl.num_programs(1) + tl.program_id(1)) * head_dim


@triton.jit
def _own_offsets(step, num_queries, query, head_dim: tl.constexpr):
    """Return where the queries' keys of one of their own steps begin in an array [own steps, n, kv_heads, D]."""
    place = (step * num_queries).to(tl.int64) + query
    return (place * tl.num_programs(1) + tl.program_id(1)) * head_dim


@triton.jit
def _walked(row, first, block: tl.constexpr):
    """Return the bounds of a tile's walk: its begin, from and up to where every query sees every key, and its end."""
    begin = tl.min(first, 0)
    inner = begin + tl.cdiv(tl.max(first, 0) - begin, block) * block
    whole = inner + tl.maximum(tl.min(row, 0) + 1 - inner, 0) // block * block
    return begin, inner, whole, tl.max(row, 0) + 1


@triton.jit
def _scores(q, keys, key, row, first, scale, masked: tl.constexpr):
    """Return the scores [pairs, keys] in bits, -inf if a query does not see a key."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * (scale * LOG2E)
    if masked:
        seen = (key[None, :] >= first[:, None]) & (key[None, :] <= row[:, None])
        scores = tl.where(seen, scores, float("-inf"))
    return scores


# -- forward -----------------------------------------------------------------------------------------------------------


@triton.jit
def _attend_blocks(
    begin, end, acc, total, peak, q, row, first, k, v, num_keys, scale,
    head_dim: tl.constexpr, width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Take the keys from `begin` to `end` into the softmax: `acc` and `total` are sums relative to exp2(peak)."""
    for start in range(begin, end, block):
        key, offsets = _key_offsets(start, num_keys, block, head_dim)
        scores = _scores(q, _load_rows(k, offsets, head_dim, width), key, row, first, scale, masked)
        higher = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        values = _load_rows(v, offsets, head_dim, width)
        acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        peak = higher
    return acc, total, peak


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_own"])
def forward_kernel(
    q, k, v, own_k, own_v, rows, firsts, out, lse, num_queries, num_keys, num_own, scale,
    group: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write the outputs [n, heads, D] and log-sum-exps [n, heads] of a tile of pairs."""
    turn = tl.num_programs(0) - 1 - tl.program_id(0)  # the longest walks first
    query, at = _pairs(turn * tile, num_queries * group, tile, group)
    row, first = tl.load(rows + query).to(tl.int32), tl.load(firsts + query).to(tl.int32)
    q_here = _load_rows(q, at * head_dim, head_dim, width)
    acc = tl.zeros([tile, width], tl.float32)
    total = tl.zeros([tile], tl.float32)
    peak = tl.full([tile], -1e30, tl.float32)  # finite: -inf - -inf is no number
    for step in range(num_own):
        offsets = _own_offsets(step, num_queries, query, head_dim)
        key = _load_rows(own_k, offsets, head_dim, width).to(tl.float32)
        score = tl.sum(q_here.to(tl.float32) * key, 1) * (scale * LOG2E)
        higher = tl.maximum(peak, score)
        weight, shrink = tl.exp2(score - higher), tl.exp2(peak - higher)
        value = _load_rows(own_v, offsets, head_dim, width).to(tl.float32)
        acc = acc * shrink[:, None] + weight[:, None] * value
        total = total * shrink + weight
        peak = higher
    bounds = _walked(row, first, block)
    for part in tl.static_range(3):
        acc, total, peak = _attend_blocks(
            bounds[part], bounds[part + 1], acc, total, peak, q_here, row, first, k, v, num_keys, scale,
            head_dim, width, block, part != 1,
        )  # fmt: skip
    _store_rows(out, at * head_dim, acc / total[:, None], head_dim, width)
    tl.store(lse + at, peak + tl.log2(total))


# -- backward ----------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_blocks(
    begin, end, dq, q, grad, lse, delta, row, first, k, v, num_keys, scale,
    head_dim: tl.constexpr, width: tl.constexpr, block: tl.constexpr, masked: tl.constexpr,
):  # fmt: skip
    """Add what the keys from `begin` to `end` contribute to the gradient of the queries, but for the scale."""
    for start in range(begin, end, block):
        key, offsets = _key_offsets(start, num_keys, block, head_dim)
        keys = _load_rows(k, offsets, head_dim, width)
        weights = tl.exp2(_scores(q, keys, key, row, first, scale, masked) - lse[:, None])
        towards = tl.dot(grad, tl.trans(_load_rows(v, offsets, head_dim, width)), input_precision="ieee")
        dscores = weights * (towards - delta[:, None])
        dq = tl.dot(dscores.to(keys.dtype), keys, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_own"])
def dq_kernel(
    grad, q, k, v, own_k, own_v, rows, firsts, out, lse, delta, dq, num_queries, num_keys, num_own, scale,
    group: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile's queries, and delta [n, heads], which the other two kernels read."""
    turn = tl.num_programs(0) - 1 - tl.program_id(0)
    query, at = _pairs(turn * tile, num_queries * group, tile, group)
    row, first = tl.load(rows + query).to(tl.int32), tl.load(firsts + query).to(tl.int32)
    q_here = _load_rows(q, at * head_dim, head_dim, width)
    grad_here = _load_rows(grad, at * head_dim, head_dim, width)
    out_here = _load_rows(out, at * head_dim, head_dim, width)
    lse_here = tl.load(lse + at)
    delta_here = tl.sum(grad_here.to(tl.float32) * out_here.to(tl.float32), 1)
    tl.store(delta + at, delta_here)
    acc = tl.zeros([tile, width], tl.float32)
    for step in range(num_own):
        offsets = _own_offsets(step, num_queries, query, head_dim)
        key = _load_rows(own_k, offsets, head_dim, width).to(tl.float32)
        value = _load_rows(own_v, offsets, head_dim, width).to(tl.float32)
        weight = tl.exp2(tl.sum(q_here.to(tl.float32) * key, 1) * (scale * LOG2E) - lse_here)
        dscore = weight * (tl.sum(grad_here.to(tl.float32) * value, 1) - delta_here)
        acc += dscore[:, None] * key
    bounds = _walked(row, first, block)
    for part in tl.static_range(3):
        acc = _dq_blocks(
            bounds[part], bounds[part + 1], acc, q_here, grad_here, lse_here, delta_here, row, first, k, v, num_keys,
            scale, head_dim, width, block, part != 1,
        )  # fmt: skip
    _store_rows(dq, at * head_dim, acc * scale, head_dim, width)


@triton.jit(do_not_specialize=["num_keys"])
def dkv_kernel(
    grad, q, k, v, rows, firsts, lse, delta, seers, dk, dv, num_keys, scale,
    group: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write the gradients of a block of step 0's keys and values, from all queries that see any of them.

    Rows and documents ascend, so those queries follow each other: from seers[0, block] to seers[1, block] - 1.
    """
    here = tl.program_id(0)
    key, offsets = _key_offsets(here * block, num_keys, block, head_dim)
    keys, values = _load_rows(k, offsets, head_dim, width), _load_rows(v, offsets, head_dim, width)
    dk_here = tl.zeros([block, width], tl.float32)
    dv_here = tl.zeros([block, width], tl.float32)
    begin = tl.load(seers + here).to(tl.int32) * group
    end = tl.load(seers + tl.num_programs(0) + here).to(tl.int32) * group
    for start in range(begin, end, tile):
        query, at = _pairs(start, end, tile, group)
        row, first = tl.load(rows + query).to(tl.int32), tl.load(firsts + query).to(tl.int32)
        once = start + tl.arange(0, tile) < end  # pairs beyond the last one are not to be added again
        seen = (key[:, None] >= first[None, :]) & (key[:, None] <= row[None, :]) & once[None, :]
        q_here = _load_rows(q, at * head_dim, head_dim, width)
        scores = tl.dot(keys, tl.trans(q_here), input_precision="ieee") * (scale * LOG2E)
        weights = tl.where(seen, tl.exp2(scores - tl.load(lse + at)[None, :]), 0.0)
        grad_here = _load_rows(grad, at * head_dim, head_dim, width)
        dv_here = tl.dot(weights.to(grad_here.dtype), grad_here, dv_here, input_precision="ieee")
        towards = tl.dot(values, tl.trans(grad_here), input_precision="ieee")
        dscores = weights * (towards - tl.load(delta + at)[None, :])
        dk_here = tl.dot(dscores.to(q_here.dtype), q_here, dk_here, input_precision="ieee")
    column = tl.arange(0, width)[None, :]
    inside = (key[:, None] < num_keys) & (column < head_dim)
    tl.store(dk + offsets[:, None] + column, (dk_here * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + offsets[:, None] + column, dv_here.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_queries", "num_rows"])
def own_kernel(
    grad, q, own_k, own_v, places, lse, delta, dk, dv, num_queries, num_rows, scale,
    group: tl.constexpr, head_dim: tl.constexpr, width: tl.constexpr, tile: tl.constexpr,
):  # fmt: skip
    """Write the gradients of one own step's keys and values, to arrays [own steps, rows, kv_heads, D]."""
    query = tl.minimum(tl.program_id(0) * tile + tl.arange(0, tile), num_queries - 1)
    step = tl.program_id(2)
    offsets = _own_offsets(step, num_queries, query, head_dim)
    key = _load_rows(own_k, offsets, head_dim, width).to(tl.float32)
    value = _load_rows(own_v, offsets, head_dim, width).to(tl.float32)
    dk_here = tl.zeros([tile, width], tl.float32)
    dv_here = tl.zeros([tile, width], tl.float32)
    for member in range(group):
        at = (query.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * group + member
        q_here = _load_rows(q, at * head_dim, head_dim, width).to(tl.float32)
        grad_here = _load_rows(grad, at * head_dim, head_dim, width).to(tl.float32)
        weight = tl.exp2(tl.sum(q_here * key, 1) * (scale * LOG2E) - tl.load(lse + at))
        dscore = weight * (tl.sum(grad_here * value, 1) - tl.load(delta + at))
        dk_here += dscore[:, None] * q_here
        dv_here += weight[:, None] * grad_here
    place = tl.load(places + step * num_queries + query)
    to = ((step * num_rows + place) * tl.num_programs(1) + tl.program_id(1)) * head_dim
    _store_rows(dk, to, dk_here * scale, head_dim, width)
    _store_rows(dv, to, dv_here, head_dim, width)


# -- from PyTorch ------------------------------------------------------------------------------------------------------


def launches(dtype: torch.dtype, head_dim: int, group: int, shared_kib: int) -> dict[str, dict[str, int]]:
    """Return each kernel's constants, warps and stages for a GPU with so much shared memory for a block.

    Sizes chosen by reckoning and not yet measured. With D = 128 in 16 bits, a forward tile of 128 pairs has 32 KiB of
    queries, and each of 3 stages of 64 keys and values 2 * 64 * 128 * 2 bytes = 32 KiB more: that fits the 163 KiB and
    227 KiB of server GPUs, not the 99 KiB of others. Products of float32 use no tensor cores: their tiles are small.
    """
    names = "tile", "block", "num_warps", "num_stages"  # pairs of a tile, keys of a block
    sizes = {"forward": (128, 64, 8, 3), "dq": (128, 64, 8, 2), "dkv": (64, 128, 8, 2)}
    if dtype == torch.float32:
        sizes = dict.fromkeys(sizes, (32, 32, 4, 2))
    elif shared_kib < 160:
        sizes = dict.fromkeys(sizes, (64, 64, 4, 1))
    constants = {"group": group, "head_dim": head_dim, "width": max(16, triton.next_power_of_2(head_dim))}
    walks = {kernel: {**constants, **dict(zip(names, size, strict=True))} for kernel, size in sizes.items()}
    return {**walks, "own": {**constants, "tile": 32, "num_warps": 4, "num_stages": 1}}


class KernelAttention(torch.autograd.Function):
    """What `JoinedAttention` of ../ttt_attention.py computes, in four kernels.

    Args of `apply`:
        rows, firsts: int64 [n], ascending: each query's row, and the first row that it sees.
        places and what follows: as `JoinedAttention`'s.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, firsts: Tensor, places: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *own: Tensor
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        how = _launches(q, k)["forward"]
        grid = triton.cdiv(len(q) * how["group"], how["tile"]), k.shape[1]
        own_k, own_v = _gathered(own[::2], places, k), _gathered(own[1::2], places, v)
        counts = len(q), len(k), len(places), q.shape[-1] ** -0.5
        with torch.cuda.device_of(q):
            forward_kernel[grid](q, k, v, own_k, own_v, rows, firsts, out, lse, *counts, **how)
        ctx.places = places
        ctx.save_for_backward(rows, firsts, q, k, v, out, lse, *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        rows, firsts, q, k, v, out, lse, *own = ctx.saved_tensors
        grad, places, how = grad.contiguous(), ctx.places, _launches(q, k)
        own_k, own_v = _gathered(own[::2], places, k), _gathered(own[1::2], places, v)
        dq, dk, dv, delta = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(lse)
        scale = q.shape[-1] ** -0.5
        with torch.cuda.device_of(q):
            grid = triton.cdiv(len(q) * how["dq"]["group"], how["dq"]["tile"]), k.shape[1]
            dq_inputs = grad, q, k, v, own_k, own_v, rows, firsts, out, lse
            dq_kernel[grid](*dq_inputs, delta, dq, len(q), len(k), len(places), scale, **how["dq"])
            seers = _seers(rows, firsts, len(k), how["dkv"]["block"])
            dkv_inputs = grad, q, k, v, rows, firsts, lse, delta, seers
            dkv_kernel[seers.shape[1], k.shape[1]](*dkv_inputs, dk, dv, len(k), scale, **how["dkv"])
            own_grads = _own_gradients((grad, q, own_k, own_v), places, (lse, delta), own, how["own"])
        return None, None, None, dq, dk, dv, *own_grads


def _launches(q: Tensor, k: Tensor) -> dict[str, dict[str, int]]:
    return launches(q.dtype, q.shape[-1], q.shape[1] // k.shape[1], _shared_kib(q.device))


@cache
def _shared_kib(device: torch.device) -> int:
    if device.type == "cpu":
        return 227  # Triton's interpreter has no limit
    return getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 << 10) // 1024


def _gathered(own: tuple[Tensor, ...] | list[Tensor], places: list[Tensor], like: Tensor) -> Tensor:
    """Return the own steps' keys or values of the queries, [own steps, n, kv_heads, D]."""
    if not own:
        return like  # never read
    out = like.new_empty(len(own), len(places[0]), *like.shape[1:])
    for here, values, place in zip(out, own, places, strict=True):
        torch.index_select(values, 0, place, out=here)
    return out


def _seers(rows: Tensor, firsts: Tensor, num_keys: int, block: int) -> Tensor:
    """Return for each block of keys the first query that sees any of them, and the end of those (int64 [2, blocks])."""
    starts = torch.arange(0, num_keys, block, device=rows.device)
    after = torch.searchsorted(firsts, starts + block - 1, right=True)
    return torch.stack([torch.minimum(torch.searchsorted(rows, starts), after), after])


def _own_gradients(
    inputs: tuple[Tensor, ...], places: list[Tensor], sums: tuple[Tensor, ...], own: list[Tensor], how: dict[str, int]
) -> list[Tensor]:
    """Return the gradients of the own steps' keys and values, 0 if a row has no query."""
    if not own:
        return []
    num_queries, num_rows, (_, kv_heads, head_dim) = len(places[0]), max(map(len, own)), own[0].shape
    dk, dv = own[0].new_zeros(2, len(places), num_rows, kv_heads, head_dim)
    grid = triton.cdiv(num_queries, how["tile"]), kv_heads, len(places)
    counts = num_queries, num_rows, head_dim**-0.5
    own_kernel[grid](*inputs, torch.stack(places), *sums, dk, dv, *counts, **how)
    return [grads[step, : len(own[2 * step])] for step in range(len(places)) for grads in (dk, dv)]
