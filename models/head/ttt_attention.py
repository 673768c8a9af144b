"""Attention of the training-time-test unroll.

At step k a row attends to step 0's keys at rows <= its own in the same document, and to the keys of steps 1 ... k at
its own row alone: plainly in `TTTAttention`, as training does in `SplitAttention`
(docs/internals/split_attention.md derives it). In a layer with a window of W it stands at position r + k, and so sees
step 0's keys at rows > r + k - W: those of its *reach* of W - k rows, its own included.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels import run_on

MAX_HEAD_DIM = 128  # of the Triton kernels
Window = Callable[[int], int | None]  # positions a layer sees, its own included; None: all (`DraftHeadConfig.window`)


class Span(NamedTuple):
    """Rows of one document that follow each other."""

    document: int  # first row of the document
    first: int
    rows: int


class QueryRows(Protocol):
    """Which rows are queries, in K steps: indices on the device, spans on the host."""

    rows: Tensor  # int64 [n_0], ascending: step 0's queries in the last layer
    steps: list[Tensor]  # per step int64 [n_k], ascending: which of `rows` are its queries
    firsts: Tensor  # int64 [T], first row of each row's document
    spans: list[list[Span]]  # per step: its queries
    documents: list[Span]  # every row


def no_window(layer: int) -> int | None:
    """Let every layer see all positions up to its own."""
    return None


def _reach(window: int | None, step: int) -> int:
    """Return how many of step 0's rows a query of a step sees, its own included."""
    reach = (window or sys.maxsize) - step
    if reach < 1:
        raise ValueError(
            f"train.ttt_steps and evaluate.num_draft_tokens (or tree_depth) must be at most the head's sliding_window "
            f"of {window}, got {step + 1}: set them lower"
        )
    return reach


class TTTAttention:
    """The plain form for documents of `lengths` rows, O(T^2) memory in them; called by step, then by layer."""

    def __init__(self, lengths: list[int], num_layers: int, window: Window = no_window) -> None:
        self._lengths, self._window = lengths, window
        self._held: list[list[tuple[Sequence[Tensor], ...]]] = [[] for _ in range(num_layers)]  # by document

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with queries [T, heads, D]; keys and values [T, kv_heads, D] join those of earlier steps."""
        group, held = q.shape[1] // k.shape[1], self._held[layer]
        held.append(tuple(x.repeat_interleave(group, dim=1).split(self._lengths) for x in (k, v)))
        keys, values = (zip(*steps, strict=True) for steps in zip(*held, strict=True))
        reach = _reach(self._window(layer), len(held) - 1)
        return torch.cat([_attend(reach, *part) for part in zip(q.split(self._lengths), keys, values, strict=True)])


def _attend(reach: int, q: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]) -> Tensor:
    """Attend within one document; `keys` and `values` hold one tensor [T, heads, D] per step so far."""
    num_rows = len(q)
    seen = torch.ones(num_rows, num_rows, dtype=torch.bool, device=q.device).tril().triu(1 - min(reach, num_rows))
    causal = torch.einsum("thd,shd->hts", q, keys[0]).masked_fill(~seen, float("-inf"))
    own_row = [torch.einsum("thd,thd->ht", q, key)[..., None] for key in keys[1:]]
    scores = torch.cat([causal, *own_row], dim=-1).to(wide_dtype(q.dtype)) * q.shape[-1] ** -0.5
    weights = scores.softmax(dim=-1).to(q.dtype)
    out = torch.einsum("hts,shd->thd", weights[..., :num_rows], values[0])
    for step, value in enumerate(values[1:]):
        out = out + weights[..., num_rows + step].T[..., None] * value
    return out


class SplitAttention:
    """The same attention split in two: flash over step 0's keys and dot products with the keys of a row's own steps.

    Nothing of size T^2 is kept. Queries of steps >= 1 stand on useful rows only, in the last layer those of step 0 too.
    `kernels` uses those in Triton where they can run.
    """

    def __init__(self, rows: QueryRows, num_layers: int, kernels: bool = False, window: Window = no_window) -> None:
        self._rows, self._num_layers, self._kernels, self._window = rows, num_layers, kernels, window
        self._keys: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # by layer and step

    def at(self, step: int) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Return the attention of one step, for `DraftHead.step`: steps in order, any of them again to recompute."""
        return partial(self._attend, step)

    def _attend(self, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Those of the forward pass: made again, they would keep all of the layers below that was made again for them.
        self._keys.setdefault((layer, step), (k, v))
        rows, steps, reach = self._rows, self._rows.steps, _reach(self._window(layer), step)
        every_row = step == 0 and layer < self._num_layers - 1
        places = [torch.searchsorted(steps[j], steps[step]) for j in range(1, step + 1)]
        inputs = places, q, *self._keys[layer, 0], *(x for j in range(1, step + 1) for x in self._keys[layer, j])
        if self._kernels and _has_triton(q):
            from ..kernels.ttt_attention import KernelAttention

            at = torch.arange(len(q), device=q.device) if every_row else rows.rows[steps[step]]
            return cast(Tensor, KernelAttention.apply(at, torch.maximum(rows.firsts[at], at - (reach - 1)), *inputs))
        blocks = list(_blocks(rows.documents if every_row else rows.spans[step], reach))
        return cast(Tensor, JoinedAttention.apply(blocks, *inputs))


def _has_triton(q: Tensor) -> bool:
    fits = q.dtype in (torch.bfloat16, torch.float16, torch.float32) and q.shape[-1] <= MAX_HEAD_DIM
    return fits and run_on(q.device)


class Kind(Enum):
    """Which keys of a block its queries see: query i all, or those j <= i, or those j >= i."""

    EVERY = auto()
    UP_TO_OWN = auto()
    FROM_OWN = auto()


class Block(NamedTuple):
    """Queries that follow each other, and rows of step 0 whose keys they see."""

    queries: slice  # where they lie in q
    keys: slice
    kind: Kind


class JoinedAttention(torch.autograd.Function):
    """One softmax over the scores with a document's keys and the scores with the row's own keys.

    Args of `apply`:
        blocks: that make up what the queries see of step 0; each query's first is of the kind UP_TO_OWN.
        places: for each of the row's own steps int64 [n], where the queries stand among that step's keys.
        q: [n, heads, D]; k, v: [T, kv_heads, D]; then keys and values [n_j, kv_heads, D] of each own step j.
    """

    @staticmethod
    def forward(
        ctx: Any, blocks: list[Block], places: list[Tensor], q: Tensor, k: Tensor, v: Tensor, *own: Tensor
    ) -> Tensor:
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
        for queries, keys, kind in blocks:
            inputs = _in_order(kind, q[queries], k[keys], v[keys])
            out_here, lse_here = _in_order(kind, *flash_forward(*inputs, causal=kind is not Kind.EVERY))
            if kind is not Kind.UP_TO_OWN:
                out_here, lse_here = _join((out[queries], lse[queries]), (out_here, lse_here))
            out[queries], lse[queries] = out_here, lse_here
        if own:
            scores = _own_scores(q, own[::2], places)  # [n, heads, own steps]
            joined = torch.cat([scores, lse[..., None]], dim=-1).logsumexp(-1)
            weights = (scores - joined[..., None]).exp().to(q.dtype)
            out *= (lse - joined).exp().to(q.dtype)[..., None]
            for j, (place, value) in enumerate(zip(places, own[1::2], strict=True)):
                weight, value_here = weights[..., j : j + 1], value.index_select(0, place).unsqueeze(2)
                _grouped(out, v).addcmul_(_grouped(weight, v), value_here)
            lse = joined
        ctx.blocks, ctx.places = blocks, places
        ctx.save_for_backward(q, k, v, out, lse, *own)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out, lse, *own = ctx.saved_tensors
        grad = grad.contiguous()
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v))  # sums over blocks
        for queries, keys, kind in ctx.blocks:
            inputs = _in_order(kind, grad[queries], q[queries], k[keys], v[keys], out[queries], lse[queries])
            gradients = flash_backward(*inputs, causal=kind is not Kind.EVERY)
            dq_here, dk_here, dv_here = _in_order(kind, *gradients)
            dq[queries] = dq_here if kind is Kind.UP_TO_OWN else dq[queries] + dq_here
            dk[keys] += dk_here
            dv[keys] += dv_here
        own_grads: list[Tensor] = []
        if own:
            scale = q.shape[-1] ** -0.5
            weights = (_own_scores(q, own[::2], ctx.places) - lse[..., None]).exp()
            delta = (grad * out).sum(-1, dtype=lse.dtype)
            for j, (place, key, value) in enumerate(zip(ctx.places, own[::2], own[1::2], strict=True)):
                key_here, value_here = (x.index_select(0, place).unsqueeze(2) for x in (key, value))
                towards = (_grouped(grad, v) * value_here).sum(-1, dtype=lse.dtype).flatten(1)
                dscore = (weights[..., j] * (towards - delta) * scale).to(q.dtype)[..., None]
                weight = weights[..., j].to(q.dtype)[..., None]
                _grouped(dq, v).addcmul_(_grouped(dscore, v), key_here)
                dkey, dvalue = torch.zeros_like(key), torch.zeros_like(value)
                own_grads.append(dkey.index_copy_(0, place, _grouped(dscore * q, v).sum(2)))
                own_grads.append(dvalue.index_copy_(0, place, _grouped(weight * grad, v).sum(2)))
        return None, None, dq, dk.to(k.dtype), dv.to(v.dtype), *own_grads


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type of softmaxes and sums: float32 for the 16-bit types, else the type itself."""
    return torch.promote_types(dtype, torch.float32)


def _blocks(spans: list[Span], reach: int) -> Iterator[Block]:
    """Yield what the queries of spans see: the last `reach` rows of their document, their own included.

    Rows that see their whole document are cut nowhere, later ones so that none is out of the reach of another.
    """
    start = 0
    for document, first, rows in spans:
        end = first + rows
        while first < end:
            whole = first < document + reach  # they see from the first row of the document on
            num = min(end, (document if whole else first) + reach) - first
            queries, past = slice(start, start + num), document if whole else first + num - reach
            yield Block(queries, slice(first, first + num), Kind.UP_TO_OWN)
            if past < first:
                yield Block(queries, slice(past, first), Kind.EVERY)
            if not whole and num > 1:  # the last query sees none of these
                yield Block(slice(start, start + num - 1), slice(first + 1 - reach, past), Kind.FROM_OWN)
            first, start = first + num, start + num


def _in_order(kind: Kind, *rows: Tensor) -> tuple[Tensor, ...]:
    """Return rows last first if the kind is FROM_OWN, which then is UP_TO_OWN."""
    return tuple(x.flip(0) for x in rows) if kind is Kind.FROM_OWN else rows


def _grouped(x: Tensor, keys: Tensor) -> Tensor:
    """View [n, heads, D] as [n, kv_heads, heads of a group, D]: its keys are not repeated."""
    return x.unflatten(1, (keys.shape[1], -1))


def _own_scores(q: Tensor, keys: Sequence[Tensor], places: list[Tensor]) -> Tensor:
    """Return the scores [n, heads, own steps] of queries with the keys of their own rows."""
    scale = q.shape[-1] ** -0.5
    columns = [
        (_grouped(q, key) * key.index_select(0, place).unsqueeze(2)).sum(-1, dtype=wide_dtype(q.dtype)).flatten(1)
        for key, place in zip(keys, places, strict=True)
    ]
    return torch.stack(columns, dim=-1) * scale


def _join(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Join two softmaxes over different keys: outputs [n, heads, D] and log-sum-exps [n, heads]."""
    joined = torch.logaddexp(one[1], other[1])
    shares = [(lse - joined).exp()[..., None] for lse in (one[1], other[1])]
    return (one[0] * shares[0] + other[0] * shares[1]).to(one[0].dtype), joined


# -- one block of queries and keys: PyTorch's flash kernel on the CPU, products in blocks of rows elsewhere ------------


def flash_forward(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend with queries [n, heads, D] to keys and values [m, kv_heads, D]; causal (n = m) or to all.

    Returns outputs [n, heads, D] and log-sum-exps of the scores [n, heads], at least float32.
    """
    if _has_kernel(q):
        out, lse = _cpu_forward(*_as_batch(q, k, v), 0.0, causal)
        return _from_batch(out), _from_batch(lse)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    for rows in _row_blocks(len(q), len(k) * q.shape[1]):
        weights, lse[rows] = _block_softmax(q, k, rows, causal)
        out[rows] = torch.einsum("kngm,mkd->nkgd", weights.to(v.dtype), v).flatten(1, 2)
        del weights  # before the next block's: kept, they would be of the size of all rows squared
    return out, lse


def flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v if `out` and `lse` are those of a softmax these keys are a part of.

    Those of k and v may be wider than they, as sums of many blocks have to be.
    """
    if _has_kernel(q):
        grad4, out4 = (_grouped(x, k).permute(2, 1, 0, 3) for x in (grad, out))
        lse4 = lse.unflatten(1, (k.shape[1], -1)).permute(2, 1, 0)
        dq, dk, dv = _cpu_backward(grad4, *_as_batch(q, k, v), out4, lse4, 0.0, causal)
        return _from_batch(dq), dk.sum(0).transpose(0, 1), dv.sum(0).transpose(0, 1)
    scale = q.shape[-1] ** -0.5
    delta = (grad * out).sum(-1, dtype=lse.dtype)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(x, dtype=wide_dtype(x.dtype)) for x in (k, v))  # sums over blocks
    for rows in _row_blocks(len(q), len(k) * q.shape[1]):
        weights, _ = _block_softmax(q, k, rows, causal, lse)
        towards = _wide_product(grad[rows], v).sub_(_of_rows(delta[rows], k)).mul_(weights).mul_(scale)
        dscores = towards.to(q.dtype)
        dq[rows] = torch.einsum("kngm,mkd->nkgd", dscores, k).flatten(1, 2)
        dk += torch.einsum("kngm,nkgd->mkd", dscores, _grouped(q[rows], k))
        dv += torch.einsum("kngm,nkgd->mkd", weights.to(q.dtype), _grouped(grad[rows], k))
        del weights, towards, dscores  # before the next block's
    return dq, dk, dv


def _has_kernel(q: Tensor) -> bool:
    return q.device.type == "cpu"


_cpu_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _as_batch(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View as [heads of a group, kv_heads, rows, D]: the group as batch, its keys shared by a stride of 0."""
    grouped = _grouped(q, k).permute(2, 1, 0, 3)
    return grouped, *(x.transpose(0, 1).expand(len(grouped), -1, -1, -1) for x in (k, v))  # type: ignore[return-value]


def _from_batch(x: Tensor) -> Tensor:
    """Undo `_as_batch`: [heads of a group, kv_heads, rows, ...] to [rows, heads, ...]."""
    return x.movedim(2, 0).transpose(1, 2).flatten(1, 2)


def _row_blocks(num_rows: int, row_size: int) -> list[slice]:
    """Cut query rows so that a block's scores stay below 2^26 numbers."""
    size = max(1, 2**26 // row_size)
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def _block_softmax(q: Tensor, k: Tensor, rows: slice, causal: bool, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights [kv_heads, rows, group, m] of some query rows, and their log-sum-exp [rows, heads]."""
    scores = _wide_product(q[rows], k).mul_(q.shape[-1] ** -0.5)
    if causal:
        keys = torch.arange(len(k), device=q.device)
        scores.masked_fill_((keys > keys[rows, None])[:, None], float("-inf"))
    here = scores.logsumexp(-1).transpose(0, 1).flatten(1) if lse is None else lse[rows]
    return scores.sub_(_of_rows(here, k)).exp_(), here


def _wide_product(x: Tensor, keys: Tensor) -> Tensor:
    """Return the products [kv_heads, n, group, m] of x [n, heads, D] with keys [m, kv_heads, D], at least float32."""
    grouped, wide = _grouped(x, keys).transpose(0, 1), wide_dtype(x.dtype)
    factors = grouped.flatten(1, 2), keys.permute(1, 2, 0)
    if x.is_cuda and x.dtype != wide:
        products = torch.bmm(*factors, out_dtype=wide)
    else:
        products = torch.bmm(*(factor.to(wide) for factor in factors))
    return products.unflatten(1, grouped.shape[1:3])


def _of_rows(values: Tensor, keys: Tensor) -> Tensor:
    """View numbers of query rows [n, heads] as [kv_heads, n, group, 1]."""
    return _grouped(values[..., None], keys).transpose(0, 1)
