"""The training loop, and the optimizer step it repeats; setup.py builds what they work with."""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..conf.runtime.progress import Progress
from ..conf.runtime.signals import StopSignals
from ..conf.schema import TrainConfig
from .checkpoints import TrainerState
from .data.online import OnlineStates
from .data.training_data import TrainingData
from .engine import end_micro_batch, learning_rate, micro_batches
from .heldout import HeldoutByLength, count_heldout, heldout_metrics, total
from .loss.fused import SUMS
from .loss.rows import PackedBatch
from .loss.unroll import TTTModule, count_rows, find_targets
from .metrics.meter import Meter
from .metrics.tracking import Tracker
from .ranks.group import Ranks, sum_over_ranks


@dataclass
class Trainer:
    """A training run between its first step and its last."""

    options: TrainConfig
    num_steps: int
    ranks: Ranks
    data: TrainingData
    module: TTTModule
    engine: Any  # DeepSpeed's, of the module
    embedding: Tensor  # [V, H], the verifier's, frozen, as is the next
    verifier_lm_head: Tensor
    online: OnlineStates | None
    meter: Meter
    state: TrainerState
    # Running mean (a tenth of each optimizer step) of the probability of acceptance at each draft step, from 0 on: the
    # losses that blend begin as KL.
    acceptance: Tensor
    draft_depth: int  # of evaluation: the best checkpoint is the one that accepts most of as many draft tokens
    save: Callable[[TrainerState], None]  # writes a checkpoint
    tracker: Tracker | None  # of rank 0

    def run(self, signals: StopSignals) -> None:
        """Take the steps that are left; if a signal asks to stop, finish one, and save."""
        state, options = self.state, self.options
        progress = Progress("train", self.num_steps, "step", done=state.step) if self.tracker else None
        if progress is not None:
            progress.set_postfix_str(self.summary({}), refresh=False)
        batches = self.data.batches(state.step * options.packs_per_step)
        num_packs = micro_batches(options.packs_per_step)
        metrics: dict[str, float] = {}
        stop = False
        if options.init_from and self.data.split.heldout and not state.step and state.best_step is None:
            self._measure(note=True, save=True)  # what that head can
        self.meter.restart()
        while state.step < self.num_steps and not (stop or state.ended):
            with self.meter.timed("waiting"):
                packs = list(itertools.islice(batches, num_packs))
            self.meter.add(packs, self.step([self._to_device(pack, options.ttt_steps) for pack in packs]))
            stop = self.ranks.any_rank(signals.received is not None)
            save = state.step % options.save_every == 0 or state.step == self.num_steps
            measure = bool(self.data.split.heldout) and (state.step % options.heldout_every == 0 or save)
            log = state.step % options.log_every == 0 or save or stop
            if log:
                metrics = self._metrics()
                if self.tracker:
                    self.tracker.log(state.step, metrics)
            with self.meter.timed("paused"):
                if measure:
                    self._measure(save, save or stop)
                elif save or stop:
                    self._save({})
            if progress is not None:
                if log or measure:
                    progress.set_postfix_str(self.summary(metrics), refresh=False)
                progress.update()
        if self.tracker and progress is not None:
            progress.close()
            self.tracker.close()

    def step(self, packs: list[PackedBatch]) -> Tensor:
        """Run forward, backward and the update of one step; return this rank's metric sums (zeros if it was skipped).

        N_k is added up over ranks and micro-batches before the first backward, so that the loss does not depend on how
        rows are spread over them. DeepSpeed averages gradients over both, which the factor undoes.
        """
        options, head, verifier = self.options, self.module.head, (self.embedding, self.verifier_lm_head)
        rows = [pack.useful_rows(options.ttt_steps) for pack in packs]
        targets = [
            find_targets(head, pack, pack_rows, self.verifier_lm_head, self.module.transform)
            for pack, pack_rows in zip(packs, rows, strict=True)
        ]
        num_counted = sum_over_ranks(torch.stack(list(map(count_rows, targets, rows))).sum(0))
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.state.step, self.num_steps)
        sums = torch.zeros(options.ttt_steps, len(SUMS), device=self.ranks.device)
        losses = []
        updated = False
        for pack, pack_targets in zip(packs, targets, strict=True):
            loss, pack_sums = self.engine(pack, *verifier, pack_targets, num_counted, self.acceptance)
            self.engine.backward(loss * options.packs_per_step)
            updated = end_micro_batch(self.engine)
            sums += pack_sums
            losses.append(loss.detach())
        self.state.step += 1
        if not updated:
            self._skip(packs, losses)
            return torch.zeros_like(sums)
        self.state.skipped_in_a_row = 0
        if self.module.loss.blends:
            overlap = sum_over_ranks(sums[:, SUMS.index("overlap")].clone())
            latest = torch.where(num_counted > 0, overlap / num_counted.clamp(min=1), self.acceptance)
            self.acceptance = torch.lerp(self.acceptance, latest, 0.1)
        return sums

    def _skip(self, packs: list[PackedBatch], losses: list[Tensor]) -> None:
        """Count a step without an update, name the samples whose loss was not finite; ValueError if too often."""
        state, here = self.state, [pack for pack, loss in zip(packs, losses, strict=True) if not loss.isfinite()]
        gathered = self.ranks.gather([name for pack in here for name in pack.non_finite_samples()])
        names = list(itertools.chain.from_iterable(gathered))
        cause = f"the loss of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "the gradient"
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        if self.ranks.rank == 0:
            print(f"train: step {state.step} is skipped: {cause} is not finite", file=sys.stderr, flush=True)
        if state.skipped_in_a_row >= self.options.max_skipped_steps:
            raise ValueError(
                f"{state.skipped_in_a_row} steps in a row were skipped, the last as {cause} is not finite: look at "
                "these samples; a higher train.max_skipped_steps passes over them, and another run with "
                "train.init_from=<the newest checkpoint> may have a lower train.lr"
            )

    def _to_device(self, batch: PackedBatch, ttt_steps: int) -> PackedBatch:
        batch = batch.to(self.ranks.device, self.embedding.dtype, ttt_steps)
        return self.online.fill(batch) if self.online else batch

    def _measure(self, note: bool, save: bool) -> None:
        """Measure held-out acceptance, record it, and save a checkpoint; `note`: which may be the best."""
        state = self.state
        self._measure_heldout()
        if self.tracker:
            self.tracker.log(state.step, heldout_metrics(state.heldout, self.data.heldout_ids))
        if note:
            state.note_best(self.draft_depth, self.options, self.data.heldout_ids)
        if save:
            self._save(state.heldout)

    def _save(self, heldout: HeldoutByLength) -> None:
        """Save a checkpoint; `heldout` is of these weights."""
        self.save(replace(self.state, acceptance=self.acceptance.tolist(), heldout=heldout))

    @torch.no_grad()
    def _measure_heldout(self) -> None:
        """Count acceptance on the held-out answers, of which every rank takes its share."""
        lengths = sorted({self.draft_depth, self.options.ttt_steps})
        read = self.data.heldout_batches(lengths[-1])
        batches = (self._to_device(batch, lengths[-1]).without_non_finite() for batch in read)
        mine = count_heldout(self.module, batches, self.embedding, self.verifier_lm_head, lengths)
        of_ranks = self.ranks.gather(mine)
        self.state.heldout = {
            length: {name: counts for part in of_ranks for name, counts in part[length].items()} for length in lengths
        }

    def _metrics(self) -> dict[str, float]:
        metrics, tokens, seconds = self.meter.read()
        self.state.tokens += tokens
        self.state.seconds += seconds
        metrics |= {"train/tokens": self.state.tokens, "train/lr": self.engine.optimizer.param_groups[0]["lr"]}
        norm = self.engine.get_global_grad_norm()
        if norm is not None and math.isfinite(norm):  # None at stage 0 in float32
            metrics["train/grad_norm"] = float(norm)
        metrics["train/skipped_steps"] = self.state.skipped_steps
        metrics["train/epoch"] = self.state.step * self.options.packs_per_step / self.data.packs_per_epoch
        return metrics

    def summary(self, metrics: dict[str, float]) -> str:
        """Return the loss and the pace in a few words, and the latest held-out acceptance."""
        words = [f"loss {metrics['train/loss']:.3f}"] if "train/loss" in metrics else []
        words += [f"{metrics['train/tokens_per_s']:,.0f} tokens/s"] if metrics else []
        heldout = {num: total(counts.values()).acceptance_length for num, counts in self.state.heldout.items()}
        return " ".join([*words, *(f"τ@{num} {length:.2f}" for num, length in heldout.items())])
