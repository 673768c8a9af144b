"""The loss of all K steps in one pass over chunks of rows, with its gradients (docs/internals/fused_loss.md).

A loss (train/loss/losses.py) gives the value of a row and the coefficients of its gradient. A row weighs gamma^k / N_k,
what is subtracted for R_k weighs c / N_k, with the gradient -sum_i W_i d log alpha_i, W_i = sum_{k >= i} c_k R_k / N_k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...models.head.ttt_attention import wide_dtype
from ...models.verifier.config import LogitTransform
from .losses import Loss, Rows
from .rows import UsefulRows

# Columns of the sums over counted rows that are given per step.
SUMS = ("loss", "kl", "counted", "agreement", "prefix_agreement", "overlap", "entropy", "outside_draft_vocab")

Index = slice | Tensor
# (z, P, rows of P, m, entropies of p, greedy draft ids) -> KL, alpha, hits, and z overwritten by q - p; `Chunk.compare`
KLRows = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass
class Targets:
    """What the pass has to know of the verifier's distributions at the n targets; finds by itself with all tokens."""

    inside: Tensor  # bool [n], whether the greedy token is in the draft vocabulary
    top: Tensor | None = None  # int64 [n], its draft id (any if it is not inside)
    log_normaliser: Tensor | None = None  # [n], log-sum-exp of the logits over the whole vocabulary

    def counted(self, rows: UsefulRows) -> list[Tensor]:
        """Return for each step which of its rows are counted (bool [n_k]): those whose greedy token can be drafted."""
        return [self.inside.index_select(0, at + step) for step, at in enumerate(rows.steps)]


@dataclass
class LossJob:
    """What the pass reads besides the draft's states and its `lm_head`."""

    loss: Loss
    rows: UsefulRows
    targets: Targets
    states: Tensor  # [n, H], the verifier's final states at the targets
    weight: Tensor  # [Vd, H], rows of the verifier's lm_head that belong to the draft vocabulary
    transform: LogitTransform
    gammas: Tensor  # [K], gamma^k
    num_counted: Tensor  # [K], N_k
    blend: Tensor  # [K], b of train/loss/losses.py
    kl_rows: KLRows | None = None  # does `Chunk.compare` for KL, on logits in the weights' type


def fused_loss(job: LossJob, states: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss, nats, and [K, 8], at least float32: the sums over counted rows, in the columns of `SUMS`.

    `states` are per step [n_k, H], of the rows that go so far; `weight` [Vd, H] is of the draft's lm_head.
    """
    return cast("tuple[Tensor, Tensor]", _FusedLoss.apply(job, weight, *states))


class _FusedLoss(torch.autograd.Function):
    """Computes gradients in its forward pass, where the logits are, and scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, job: LossJob, weight: Tensor, *states: Tensor) -> tuple[Tensor, Tensor]:
        wide = wide_dtype(weight.dtype)
        state_grads = [torch.empty_like(state) for state in states] if any(ctx.needs_input_grad[2:]) else None
        weight_grad = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        sums = torch.zeros(len(states), len(SUMS), dtype=wide, device=weight.device)
        for chunk, h, z in chunks(job, states, weight, ctx.needs_input_grad[1]):
            scale = torch.cat(chunk.differentiate(z.split(chunk.sizes), sums))[:, None]
            z = z.to(weight.dtype)
            if state_grads is not None:
                dh = product(z, weight, h.new_empty(h.shape, dtype=wide)) * scale
                for grad, rows, part in zip(state_grads, chunk.rows, dh.split(chunk.sizes), strict=True):
                    grad[rows] = part
            if weight_grad is not None:
                add_product(weight_grad, z.T, h * scale.to(h.dtype))
        ctx.grads, ctx.dtype = (weight_grad, state_grads), weight.dtype
        loss = (sums[:, SUMS.index("loss")] / job.num_counted.clamp(min=1)).sum()
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _grad_sums: Tensor) -> tuple[Any, ...]:
        weight_grad, state_grads = ctx.grads
        ctx.grads = None, None
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(grad_loss).to(ctx.dtype)
        return None, weight_grad, *(grad.mul_(grad_loss) for grad in state_grads or [])


@torch.no_grad()
def draft_tokens(job: LossJob, states: list[Tensor], weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the most likely draft ids (int64 [n_k]) and alpha (at least float32 [n_k]) per step; see `fused_loss`."""
    assert not job.kl_rows, "logits in the weights' type would make other tokens equally likely"
    tokens = [torch.empty(len(state), dtype=torch.int64, device=state.device) for state in states]
    overlaps = [torch.empty(len(state), dtype=wide_dtype(weight.dtype), device=state.device) for state in states]
    for chunk, _, logits in chunks(job, states, weight):
        for step, z in enumerate(logits.split(chunk.sizes)):
            rows = chunk.rows[step]
            tokens[step][rows] = z.argmax(-1)
            _, overlaps[step][rows], _ = chunk.compare(z, chunk.at[step])
    return tokens, overlaps


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write the matrix product a b into `out`, which may be wider than the two."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)  # type: ignore[call-overload, no-any-return]
    return out.copy_(a @ b)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product a b to `total`, which may be wider: then some rows at a time, through a small matrix."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
        return
    size = max(1, SLICE_BYTES // (total.shape[1] * total.element_size()))
    through = total.new_empty(min(size, len(total)), total.shape[1])
    for start in range(0, len(total), size):
        part = a[start : start + size]
        total[start : start + size] += product(part, b, through[: len(part)])


# -- chunks of rows ----------------------------------------------------------------------------------------------------

# Bytes of a chunk's matrices. On the CPU enough rows for products at full speed, on a GPU enough to fill it.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 1 << 30}
SLICE_BYTES = 32 << 20  # of products that are added to a wider matrix: they stay in a GPU's cache
BLOCK_BYTES = 512 << 10  # of logits a thread works on at once; as much of P and of scratch come to its cache with them


def rows_in_chunk(ttt_steps: int, width: int, dtype: torch.dtype, device: torch.device, trained_width: int = 0) -> int:
    """Return how many rows of all K steps fit the memory budget: `CHUNK_BYTES`, or as much as the gradient of lm_head.

    Every chunk reads and writes that gradient, so chunks that are small next to it would do little else. A row has K
    rows of logits, one of the window, whose first K-1 come on top, and two of scratch, all Vd wide; in 16-bit training
    also K of gradients, rounded for the products (docs/internals/fused_loss.md, Memory). `width` is Vd,
    `trained_width` the H of an lm_head that is trained.
    """
    item = torch.finfo(wide_dtype(dtype)).bits // 8
    row = item * (ttt_steps + 3) + (2 * ttt_steps if item > torch.finfo(dtype).bits // 8 else 0)
    column = max(CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // width, item * trained_width)
    return max(1, (column - item * (ttt_steps - 1)) // row)


def chunks(
    job: LossJob, states: Sequence[Tensor], weight: Tensor, trained: bool = False
) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
    """Cut the useful rows into chunks; with each come the states of its steps, end to end, and their logits."""
    trained_width = weight.shape[1] if trained else 0
    num_rows, ttt_steps, wide = len(job.states), len(job.rows.steps), wide_dtype(weight.dtype)
    size = rows_in_chunk(ttt_steps, len(weight), weight.dtype, weight.device, trained_width)
    size = min(size, max(1, num_rows))
    logits = weight.new_empty(size * ttt_steps, len(weight), dtype=weight.dtype if job.kl_rows else wide)
    window, scratch = weight.new_empty(2, size + ttt_steps - 1, len(weight), dtype=wide)
    for start in range(0, num_rows, size):
        chunk = Chunk(job, start, min(start + size, num_rows), window, scratch)
        h = torch.cat([state[rows] for state, rows in zip(states, chunk.rows, strict=True)])
        yield chunk, h, product(h, weight.T, logits[: len(h)])


def blocks(z: Tensor, at: Index) -> Iterator[tuple[slice, Index]]:
    """Cut the rows of z [n, Vd], and those of the window that are their targets, to blocks that fit a CPU's cache.

    On a GPU all rows are one block.
    """
    size = len(z) if z.is_cuda else BLOCK_BYTES * torch.get_num_threads() // (z.shape[1] * z.element_size())
    size = max(1, size)
    for start in range(0, max(1, len(z)), size):
        rows = slice(start, min(start + size, len(z)))
        yield rows, at[rows] if isinstance(at, Tensor) else slice(at.start + rows.start, at.start + rows.stop)


def row_dot(a: Tensor, b: Tensor, scratch: Tensor) -> Tensor:
    """Return the inner product [n] of each row of a with that of b, both [n, V]; `scratch` may be b.

    Not as a matrix product: `sum` adds in pairs, a product may add V terms one after the other and lose four digits.
    """
    return torch.mul(a, b, out=scratch).sum(-1)


class Chunk:
    """Rows start ... end-1 of the useful rows at all K steps, and their window: the verifier's P at their targets."""

    def __init__(self, job: LossJob, start: int, end: int, window: Tensor, scratch: Tensor) -> None:
        self.job, self.scratch, self.num_rows = job, scratch, end - start
        self.rows = [slice(starts[start], starts[end]) for starts in job.rows.starts]  # among each step's
        self.sizes = [rows.stop - rows.start for rows in self.rows]
        targets = slice(start, end + len(self.rows) - 1)
        self.inside = job.targets.inside[targets]
        self._read_window(targets, window)
        self.places: list[Index] = []  # per step, which rows of the chunk
        self.at: list[Index] = []  # per step, the window's rows that are their targets
        for step, rows in enumerate(self.rows):
            if self.sizes[step] == self.num_rows:  # no answer ends here: views, no gathers
                self.places.append(slice(0, self.num_rows))
                self.at.append(slice(step, step + self.num_rows))
            else:
                place = job.rows.steps[step][rows] - start
                self.places.append(place)
                self.at.append(place + step)

    def _read_window(self, targets: slice, out: Tensor) -> None:
        """Compute P [window, Vd] into `out`, and [window] its sums, entropies of p, and draft ids of greedy tokens."""
        job, states = self.job, self.job.states[targets]
        logits = job.transform.apply_(product(states, job.weight.T, out[: len(states)]))
        log_p = self.scratch[: len(states)]
        if job.targets.log_normaliser is None:
            self.top = logits.max(-1).indices  # argmax is slower on the CPU
            torch.log_softmax(logits, -1, out=log_p)
        else:
            assert job.targets.top is not None
            self.top = job.targets.top[targets]
            torch.sub(logits, job.targets.log_normaliser[targets, None], out=log_p)
        self.probabilities = torch.exp(log_p, out=logits)
        # A mass that underflows has its greedy token outside and is not counted: it must not make infinities.
        self.mass = self.probabilities.sum(-1).clamp(min=torch.finfo(out.dtype).tiny)
        self.entropy = self.mass.log() - row_dot(self.probabilities, log_p, log_p) / self.mass

    def differentiate(self, logits: tuple[Tensor, ...], sums: Tensor) -> list[Tensor]:
        """Turn the logits of each step [rows, Vd] into their gradient, in place, and add to the sums.

        Returns per step a weight for each row, by which its gradient is to be multiplied: 0 if it is not counted.
        """
        job = self.job
        counted = [self.inside[at] for at in self.at]
        prefix = torch.ones(self.num_rows, dtype=torch.bool, device=sums.device)
        reach = torch.ones(self.num_rows, dtype=sums.dtype, device=sums.device)
        overlaps, reaches = [], []
        coefficients: list[tuple[Tensor | None, Tensor]] = []
        for step, (z, place, at) in enumerate(zip(logits, self.places, self.at, strict=True)):
            kl, overlap, hits = self.compare(z, at)
            prefix[place] = prefix[place] & hits & counted[step]
            reach[place] = reach[place] * overlap
            overlaps.append(overlap)
            reaches.append(reach[place] * counted[step])
            rows = Rows(kl, overlap, reach[place], job.gammas[step], job.blend[step])
            if job.loss.gradient_:
                inputs = z, self.probabilities[at], self.mass[at], self.scratch[: len(z)]
                value = rows.gamma * job.loss.gradient_(*inputs)
            else:
                value = job.loss.value(rows)
            if job.loss.coefficients:
                (of_kl, of_overlap), one = job.loss.coefficients(rows), torch.ones_like(overlap)
                coefficients.append((None if of_kl is None else of_kl * one, of_overlap * one))
            columns = (value, kl, torch.ones_like(kl), hits, prefix[place], overlap, self.entropy[at])
            included = torch.stack([column * counted[step] for column in columns]).sum(-1)
            sums[step] += torch.cat([included, (~counted[step]).sum()[None]])
        weights = job.gammas / job.num_counted.clamp(min=1)
        if job.loss.reach_share:
            gains = self._gains(job.loss.reach_share(job.blend), reaches)
            for step, (a, b) in enumerate(coefficients):
                a = None if a is None else a * weights[step]
                coefficients[step] = a, b * weights[step] + gains[step] / overlaps[step]
            weights = torch.ones_like(weights)
        for step, pair in enumerate(coefficients):
            self._gradient(logits[step], self.at[step], *pair)
        return [rows * weight for rows, weight in zip(counted, weights, strict=True)]

    def compare(self, z: Tensor, at: Index) -> tuple[Tensor, Tensor, Tensor]:
        """Turn logits, in place, into q, or for KL into q - p.

        Returns KL(p || q), alpha, and whether the greedy tokens are the same (of equal logits either is).
        """
        if self.job.kl_rows:
            targets = at if isinstance(at, Tensor) else torch.arange(at.start, at.stop, device=z.device)
            window = self.probabilities, targets, self.mass, self.entropy, self.top
            kl, overlap, hits = self.job.kl_rows(z, *window)
            return kl, overlap.clamp(min=torch.finfo(overlap.dtype).tiny), hits
        found = []
        for rows, here in blocks(z, at):
            q, probabilities, scratch = z[rows], self.probabilities[here], self.scratch[: rows.stop - rows.start]
            cross = row_dot(probabilities, q, scratch) / self.mass[here]
            highest = q.amax(-1)  # finding where it stands costs six times as much on the CPU
            hits = q.gather(1, self.top[here][:, None]).squeeze(1) == highest
            torch.softmax(q, -1, out=q)
            log_normaliser = highest - q.amax(-1).log()
            overlap = torch.minimum(probabilities, q, out=scratch).sum(-1)
            found.append((log_normaliser - cross - self.entropy[here], overlap, hits))
            if self.job.loss.is_kl:
                q.addcmul_(probabilities, (1 / self.mass[here])[:, None], value=-1)
        kl, overlap, hits = (torch.cat(column) for column in zip(*found, strict=True))
        return kl, overlap.clamp(min=torch.finfo(z.dtype).tiny), hits

    def _gains(self, shares: Tensor, reaches: list[Tensor]) -> list[Tensor]:
        """Return W_i of each step: what is still to be gained from accepting there, sum_{k >= i} c_k R_k / N_k."""
        total = torch.zeros(self.num_rows, dtype=self.scratch.dtype, device=self.scratch.device)
        gains = []
        for step in reversed(range(len(reaches))):
            place = self.places[step]
            weight = shares[step] / self.job.num_counted[step].clamp(min=1)
            total[place] = total[place] + weight * reaches[step]
            gains.append(total[place].clone())
        return gains[::-1]

    def _gradient(self, q: Tensor, at: Index, of_kl: Tensor | None, of_overlap: Tensor) -> None:
        """Turn q, in place, into of_kl (q - p) + of_overlap q (s - [q < P]), the two one a row."""
        for rows, here in blocks(q, at):
            part, probabilities = q[rows], self.probabilities[here]
            below = torch.mul(part, part < probabilities, out=self.scratch[: len(part)])
            whole = of_overlap[rows] * below.sum(-1)
            part.mul_((whole if of_kl is None else whole + of_kl[rows])[:, None])
            part.addcmul_(below, of_overlap[rows, None], value=-1)
            if of_kl is not None:
                part.addcmul_(probabilities, (of_kl[rows] / self.mass[here])[:, None], value=-1)
