"""Training-time test (EAGLE-3, arXiv:2503.01840): the unroll of K draft steps, and the module that is trained.

Teacher-forced steps do not need each other's logits, so all K are unrolled first (`unroll`) and one pass over their
states forms the loss (`fused_loss`); tests/twins/plain_ttt.py does the same in the plain form. What row r is fed and
predicts at step k stands in train/loss/rows.py.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models.head.draft_head import DraftHead, Projected
from ...models.head.ttt_attention import SplitAttention, wide_dtype
from ...models.verifier.config import LogitTransform
from .fused import KLRows, LossJob, Targets, fused_loss, product, rows_in_chunk
from .losses import LOSSES, Loss
from .rows import PackedBatch, UsefulRows

Unroll = Callable[..., list[Tensor]]  # takes and gives what `unroll` does; the loss does not care how


def unroll(
    head: DraftHead,
    batch: PackedBatch,
    rows: UsefulRows,
    embedding: Tensor,
    recompute: bool = False,
    kernels: bool = False,
) -> list[Tensor]:
    """Return for each step k the states [n_k, H] of the rows `rows.rows[rows.steps[k]]`, for `head.lm_head`.

    `embedding` [V, H] is the verifier's. With `recompute` only a step's inputs are kept, and it runs again in the
    backward pass; with `kernels` Triton does the attention, on a GPU.
    """
    attention = SplitAttention(rows, head.config.num_layers, kernels, head.config.window)
    # The embedding's share of the first layer's projections, of every token: step k reads it k rows further on.
    projected = head.project_embedding(head.embed(batch.input_ids, embedding))
    every_row = torch.arange(len(batch.input_ids), device=embedding.device)
    state = head.fuse(batch.states[0])
    states: list[Tensor] = []
    for step, (places, from_previous) in enumerate(zip(rows.steps, rows.from_previous, strict=True)):
        at = rows.rows[places] if step else every_row
        fed = (at + step + 1).clamp(max=len(every_row) - 1)
        state = state.index_select(0, from_previous) if step else state
        shares = cast(Projected, tuple(share.index_select(0, fed) for share in projected))
        output_rows = None if step else rows.rows
        run = partial(checkpoint, head.step, use_reentrant=False) if recompute else head.step
        rotary = head.rotary(batch.position[at] + step, state)
        state, normed = run(shares, state, rotary, attention.at(step), output_rows)
        states.append(normed)
    return states


@torch.no_grad()
def find_targets(
    head: DraftHead, batch: PackedBatch, rows: UsefulRows, verifier_lm_head: Tensor, transform: LogitTransform
) -> Targets:
    """Return what N_k and the loss need of the verifier's distributions, read off chunk by chunk."""
    vocab_size, device = len(verifier_lm_head), verifier_lm_head.device
    if len(head.d2t) == vocab_size:
        return Targets(torch.ones(len(rows.rows), dtype=torch.bool, device=device))
    states = batch.states[1].index_select(0, rows.rows + 1)
    size, wide = rows_in_chunk(1, vocab_size, states.dtype, device), wide_dtype(states.dtype)
    top, log_normaliser = (torch.empty(len(states), dtype=dtype, device=device) for dtype in (torch.int64, wide))
    out = torch.empty(min(size, len(states)), vocab_size, dtype=wide, device=device)
    for start in range(0, len(states), size):
        part = slice(start, start + size)
        logits = transform.apply_(product(states[part], verifier_lm_head.T, out[: len(states[part])]))
        highest, top[part] = logits.max(-1)
        # As logits.logsumexp(-1), in place.
        log_normaliser[part] = logits.sub_(highest[:, None]).exp_().sum(-1).log_().add_(highest)
    draft_ids = (head.t2d.cumsum(0) - 1).clamp(min=0)  # a token below the first inside has none, and any will do
    return Targets(head.t2d[top], draft_ids[top], log_normaliser)


def count_rows(targets: Targets, rows: UsefulRows) -> Tensor:
    """Return the rows a batch counts at each step (float32 [K])."""
    return torch.stack([counted.sum() for counted in targets.counted(rows)]).float()


class TTTModule(nn.Module):
    """The trained module: a draft head and the loss of its unroll.

    L = sum_k gamma^k sum_counted KL(p || q) / N_k, nats, or another of `LOSSES`, over rows whose target's greedy token
    is in the draft vocabulary. Softmax is in float32. `transform` is how the verifier's logits come from its `lm_head`,
    `blend_rate` of the losses that blend (`Rows.blend`); `kl_rows` does the row-wise part of the KL loss.
    """

    def __init__(
        self,
        head: DraftHead,
        ttt_steps: int,
        gamma: float,
        loss: Loss = LOSSES["kl"],
        transform: LogitTransform = LogitTransform(),  # noqa: B008
        blend_rate: float = 3.0,
        recompute: bool = False,
        kernels: bool = False,
        kl_rows: KLRows | None = None,
        unroll: Unroll = unroll,
    ) -> None:
        super().__init__()
        assert loss.is_kl or not kl_rows, loss
        self.head, self.ttt_steps, self.gamma, self.loss, self.transform = head, ttt_steps, gamma, loss, transform
        self.blend_rate, self.recompute, self.kernels, self.kl_rows = blend_rate, recompute, kernels, kl_rows
        self.unroll = unroll

    def forward(
        self,
        batch: PackedBatch,
        embedding: Tensor,
        verifier_lm_head: Tensor,
        targets: Targets | None = None,
        num_counted: Tensor | None = None,
        acceptance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of a packed batch, and the sums its metrics are made of: float32 [K, 8], columns of `SUMS`.

        `embedding` and `verifier_lm_head` are the verifier's, [V, H]. If None, `targets` are found here, `num_counted`
        (N_k over all ranks and micro-batches of the optimizer step, float32 [K]) is this batch's own, and `acceptance`
        (the running mean of alpha at each step, for the losses that blend, float32 [K]) is 0.
        """
        rows = batch.useful_rows(self.ttt_steps)
        job = self.job(batch, rows, verifier_lm_head, targets, num_counted, acceptance)
        states = self.unroll(self.head, batch, rows, embedding, self.recompute, self.kernels)
        return cast("tuple[Tensor, Tensor]", self.head.lm_head(states, partial(fused_loss, job)))

    def job(
        self,
        batch: PackedBatch,
        rows: UsefulRows,
        verifier_lm_head: Tensor,
        targets: Targets | None = None,
        num_counted: Tensor | None = None,
        acceptance: Tensor | None = None,
    ) -> LossJob:
        """Return what the pass reads besides the draft's states; arguments as `forward`'s."""
        if targets is None:
            targets = find_targets(self.head, batch, rows, verifier_lm_head, self.transform)
        ttt_steps, device = len(rows.steps), verifier_lm_head.device
        acceptance = torch.zeros(ttt_steps, device=device) if acceptance is None else acceptance
        num_counted = count_rows(targets, rows) if num_counted is None else num_counted
        wide, full = wide_dtype(verifier_lm_head.dtype), len(self.head.d2t) == len(verifier_lm_head)
        return LossJob(
            self.loss,
            rows,
            targets,
            states=batch.states[1].index_select(0, rows.rows + 1),
            weight=verifier_lm_head if full else verifier_lm_head.index_select(0, self.head.target_ids),
            transform=self.transform,
            gammas=self.gamma ** torch.arange(ttt_steps, device=device, dtype=wide),
            num_counted=num_counted.to(wide),
            blend=(-self.blend_rate * acceptance).exp().to(wide),
            kl_rows=self.kl_rows,
        )
