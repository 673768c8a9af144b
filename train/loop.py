"""The train stage: a draft head trained by DeepSpeed from the hidden-state store, or next to the verifier."""

from __future__ import annotations

import dataclasses
import itertools
import math
import secrets
import sys
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..conf.runtime.artifact import Artifact, artifact, digest, file_digest, made_with, write_atomic
from ..conf.runtime.progress import Progress
from ..conf.runtime.signals import StopSignals, deferred
from ..conf.schema import Config, HiddenStates
from ..data_synthesis.verifier_check import check_verifier
from ..models.formats.plain import WEIGHTS, checkpoint_steps
from ..models.head.architectures import build_head
from ..models.head.config import describe_sizes
from ..models.head.draft_head import DraftHead, initialise
from ..models.kernels.self_check import Checked, require_gpu
from ..models.verifier.config import load_config, logit_transform
from ..models.verifier.weights import VerifierWeights
from .checkpoints import TrainerState, load_checkpoint, needs_conversion, save_checkpoint
from .data.training_data import TrainingData
from .engine import end_micro_batch, learning_rate, micro_batches, start_engine
from .heldout import HeldoutByLength, count_heldout, total
from .loss.fused import SUMS
from .loss.kernel_checks import ATTENTION, check_training
from .loss.losses import LOSSES
from .loss.rows import PackedBatch
from .loss.unroll import TTTModule, count_rows, find_targets
from .metrics.meter import Meter
from .metrics.tracking import Tracker, run_description
from .online import OnlineStates
from .ranks.group import Ranks, joined, sum_over_ranks
from .warm_start import trained_head

# Options that change how a run is watched or kept, not what it computes.
_NOT_DETERMINING = (
    *("log_every", "heldout_every", "heldout_samples", "save_every", "keep_checkpoints", "max_skipped_steps"),
    *("num_processes", "data_workers", "collective_timeout_s", "verify_checksums", "checkpoint_activations", "triton"),
    *("stores", "init_from"),  # what is there counts by content
)


def train(config: Config) -> None:
    """Train the draft head on hidden-state stores into runs/<name>/training/; goes on from where it was killed."""
    with joined(config) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    micro_batches(config)  # refused before anything is read
    require_gpu("train.triton", config.train.triton, ranks.device)
    initial_head = trained_head(config) if config.train.init_from else None
    shape = initial_head.config if initial_head else check_verifier(config)
    if ranks.rank == 0 and not initial_head:
        print(f"train: the head has an {describe_sizes(config.draft, load_config(config.verifier))}", flush=True)
    with ExitStack() as stack:
        data = stack.enter_context(TrainingData(config, shape, ranks.rank, ranks.world, ranks.device.type == "cuda"))
        head = initial_head or build_head(shape, data.vocabulary)
        settings = _settings(config, data, head)
        saved = checkpoint_steps(config.training_folder / "checkpoints")
        ranks.agree({**settings, "newest checkpoint in runs_dir": saved[-1:]})
        resumed = made_with(config.training_folder, settings) if saved else None
        if resumed and resumed.complete:
            if ranks.rank == 0:
                print(f"training: {config.training_folder} is complete")
            return
        kernels = check_training(config.train, shape, ranks)
        if config.train.verify_checksums and not resumed:
            data.verify()
        target = None
        if ranks.rank == 0:
            opened = artifact(config.training_folder, "training", settings, config.overwrite)
            target = stack.enter_context(opened)
        ranks.any_rank(False)  # no rank goes on before the folder is cleared
        Trainer(config, data, head, ranks, target, kernels).run()


def _settings(config: Config, data: TrainingData, head: DraftHead) -> dict[str, Any]:
    """Return everything that determines the weights."""
    options = {key: value for key, value in dataclasses.asdict(config.train).items() if key not in _NOT_DETERMINING}
    is_online = config.train.hidden_states is HiddenStates.online
    online = {"verifier_dtype": config.verifier.dtype.value} if is_online else {}
    return {
        "hidden_states": data.settings,
        **online,
        "draft_vocabulary": digest(head.target_ids.tolist()),
        "draft": dataclasses.asdict(config.draft),
        "train": {key: value.value if isinstance(value, Enum) else value for key, value in options.items()},
        "init_from": file_digest(Path(config.train.init_from) / WEIGHTS) if config.train.init_from else None,
    }


class Trainer:
    """One training run: its head, its data, its records."""

    def __init__(
        self,
        config: Config,
        data: TrainingData,
        head: DraftHead,
        ranks: Ranks,
        target: Artifact | None,
        kernels: Checked,
    ) -> None:
        self.config, self.data, self.ranks = config, data, ranks
        self.kernels = kernels
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        device = ranks.device
        self.target = target  # on rank 0
        self.dtype = getattr(torch, config.train.dtype.value)
        weights = VerifierWeights(config.verifier)
        embedding, verifier_lm_head = weights.embedding(), weights.lm_head()
        self.embedding = embedding.to(device, self.dtype)
        self.verifier_lm_head = verifier_lm_head.to(device, self.dtype)
        self.head = head.to(device)
        transform = logit_transform(load_config(config.verifier))
        if not config.train.init_from:
            initialise(self.head, embedding, verifier_lm_head * transform.scale, config.train.seed)
        self.head.lm_head.weight.requires_grad_(config.draft.train_lm_head)
        is_online = config.train.hidden_states is HiddenStates.online
        self.online = OnlineStates.load(config, head.config.aux_layers, ranks.gpus) if is_online else None
        options = config.train
        self.module = TTTModule(
            self.head,
            options.ttt_steps,
            options.gamma,
            LOSSES[options.loss.value],
            transform,
            options.blend_rate,
            options.checkpoint_activations,
            ATTENTION in kernels.used,
        )
        self.num_parameters = sum(parameter.numel() for parameter in head.parameters())
        self.checkpoints = config.training_folder / "checkpoints"
        universal = needs_conversion(self.checkpoints, config.deepspeed.zero_stage)
        self.engine = start_engine(self.module, config, universal)
        ranks.bound_collectives()
        # Running mean (a tenth of each optimizer step) of the probability of acceptance at each draft step, from 0 on:
        # the losses that blend begin as KL.
        self.acceptance = torch.zeros(options.ttt_steps, device=device)
        self.state = TrainerState()
        self.walks: HeldoutByLength = {}  # the latest

        self.micro_batches = micro_batches(config)
        self.packs_per_step = options.packs_per_step
        self.num_steps = options.max_steps or max(1, options.epochs * data.packs_per_epoch // self.packs_per_step)
        self.draft_lengths = sorted({config.evaluate.draft_depth, config.train.ttt_steps})
        self.meter = Meter(self.head.config, config.draft.train_lm_head, ranks, self.dtype)

    def run(self) -> None:
        """Train from the newest checkpoint, or the start, to the last step."""
        self._resume()
        tracker = self._tracker() if self.rank == 0 else None
        waits = "it finishes the step, or held-out walk, at work and saves a checkpoint"
        with deferred(waits, then_stop=False) as signals:  # all ranks stop together, or are done
            self._run(signals, tracker)

    def _run(self, signals: StopSignals, tracker: Tracker | None) -> None:
        """Take the steps that are left.

        Raises:
            SystemExit: a signal asked to stop; everything is saved.
        """
        state, options = self.state, self.config.train
        progress = Progress("train", self.num_steps, "step", done=state.step) if self.rank == 0 else None
        if progress is not None:
            progress.set_postfix_str(self._postfix({}), refresh=False)
        batches = self.data.batches(state.step * self.packs_per_step)
        sums = torch.zeros(options.ttt_steps, len(SUMS), device=self.device)
        metrics: dict[str, float] = {}
        stop = False
        self.meter.restart()
        while state.step < self.num_steps and not stop:
            with self.meter.waiting():
                read = list(itertools.islice(batches, self.micro_batches))
            self.meter.add(read)
            sums += self._optimizer_step([self._to_device(batch, options.ttt_steps) for batch in read])
            stop = self.ranks.any_rank(signals.received is not None)
            save = state.step % options.save_every == 0 or state.step == self.num_steps
            log = state.step % options.log_every == 0 or save or stop
            walk = bool(self.data.split.heldout) and (state.step % options.heldout_every == 0 or save)
            if log:
                metrics = self._metrics(sums)
                if tracker:
                    tracker.log(state.step, metrics)
                sums.zero_()
            with self.meter.paused():
                if walk:
                    self._walk_heldout()
                    if tracker:
                        tracker.log(state.step, {f"heldout/{name}": tau for name, tau in self._acceptance().items()})
                if save or stop:
                    self._save(walk)
            if progress is not None:
                if log or walk:
                    progress.set_postfix_str(self._postfix(metrics), refresh=False)
                progress.update()
        if tracker and progress is not None:
            progress.close()
            tracker.close()
        if state.step < self.num_steps:
            if self.rank == 0:
                print(
                    f"training: stopped by {signals.name}, step {state.step} is saved; the same command goes on",
                    flush=True,
                )
            sys.exit(signals.exit_code)
        if self.target:
            self.target.finish(steps=self.num_steps, heldout=self._acceptance())
            print(f"training: step {self.num_steps} in {self.checkpoints}; held-out {self._postfix({})}")

    def _resume(self) -> None:
        """Load the newest checkpoint if there is one, and write what the run is to its folder."""
        loaded = load_checkpoint(self.engine, self.checkpoints)
        if loaded:
            self.state, self.walks = loaded, loaded.walks
            self.acceptance = torch.tensor(loaded.acceptance, device=self.device)
        if self.target:
            self._announce()
            wandb_run = self.target.manifest.get("wandb_run") or secrets.token_hex(8)
            self.target.save(complete=False, wandb_run=wandb_run, kernels=self.kernels.record)
            values = OmegaConf.to_yaml(OmegaConf.structured(self.config))
            write_atomic(self.target.folder / "config.yaml", values)

    def _save(self, walked: bool) -> None:
        """Write a checkpoint: the best so far if its weights were `walked` and accept more than those saved before."""
        state = self.state
        state.acceptance = self.acceptance.tolist()
        state.walks = self.walks if walked else {}
        if walked:
            num = self.config.evaluate.draft_depth
            found, measure = total(self.walks[num].values()).acceptance_length, digest([num, sorted(self.walks[num])])
            if state.best_step is None or measure != state.best_measure or found > state.best_acceptance_length:
                state.best_step, state.best_acceptance_length, state.best_measure = state.step, found, measure
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self.engine, self.head, self.checkpoints, state, self._record(walked), keep)

    def _optimizer_step(self, packed: list[PackedBatch]) -> Tensor:
        """Run forward, backward and the update of one step; give this rank's metric sums (zeros if it was skipped).

        N_k is added up over ranks and micro-batches before the first backward, so that the loss does not depend on how
        rows are spread over them. DeepSpeed averages gradients over both, which the factor undoes.
        """
        options = self.config.train
        rows = [batch.useful_rows(options.ttt_steps) for batch in packed]
        targets = [
            find_targets(self.head, batch, here, self.verifier_lm_head, self.module.transform)
            for batch, here in zip(packed, rows, strict=True)
        ]
        num_counted = sum_over_ranks(
            torch.stack([count_rows(*pair) for pair in zip(targets, rows, strict=True)]).sum(0)
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(options, self.state.step, self.num_steps)
        sums = torch.zeros(options.ttt_steps, len(SUMS), device=self.device)
        losses = []
        updated = False
        for batch, batch_targets in zip(packed, targets, strict=True):
            arguments = batch_targets, num_counted, self.acceptance
            loss, batch_sums = self.engine(batch, self.embedding, self.verifier_lm_head, *arguments)
            self.engine.backward(loss * self.packs_per_step)
            updated = end_micro_batch(self.engine)
            sums += batch_sums
            losses.append(loss.detach())
        self.state.step += 1
        if not updated:
            self._skip(packed, losses)
            return torch.zeros_like(sums)
        self.state.skipped_in_a_row = 0
        if self.module.loss.blends:
            overlap = sum_over_ranks(sums[:, SUMS.index("overlap")].clone())
            latest = torch.where(num_counted > 0, overlap / num_counted.clamp(min=1), self.acceptance)
            self.acceptance = torch.lerp(self.acceptance, latest, 0.1)
        return sums

    def _skip(self, packed: list[PackedBatch], losses: list[Tensor]) -> None:
        """Count a step without an update and name the samples whose loss was not finite.

        Raises:
            ValueError: too many such steps in a row.
        """
        here = [batch for batch, loss in zip(packed, losses, strict=True) if not loss.isfinite()]
        gathered = self.ranks.gather([name for batch in here for name in batch.non_finite_samples()])
        names = [name for of_rank in gathered for name in of_rank]
        cause = f"the loss of {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}" if names else "the gradient"
        self.state.skipped_steps += 1
        self.state.skipped_in_a_row += 1
        if self.rank == 0:
            print(f"train: step {self.state.step} is skipped: {cause} is not finite", file=sys.stderr, flush=True)
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise ValueError(
                f"{self.state.skipped_in_a_row} steps in a row were skipped, the last as {cause} is not finite: look "
                "at these samples; a higher train.max_skipped_steps passes over them, and another run with "
                "train.init_from=<the newest checkpoint> may have a lower train.lr"
            )

    def _to_device(self, batch: PackedBatch, ttt_steps: int) -> PackedBatch:
        """Return a batch on this rank's device, with its states."""
        batch = batch.to(self.device, self.dtype, ttt_steps)
        return self.online.fill(batch) if self.online else batch

    @torch.no_grad()
    def _walk_heldout(self) -> None:
        """Walk the held-out answers, of which every rank takes its share."""
        steps = max(self.draft_lengths)
        batches = (self._to_device(batch, steps) for batch in self.data.heldout_batches(steps))
        mine = count_heldout(self.module, batches, self.embedding, self.verifier_lm_head, self.draft_lengths)
        of_ranks = self.ranks.gather(mine)
        self.walks = {num: {k: v for walks in of_ranks for k, v in walks[num].items()} for num in self.draft_lengths}

    def _acceptance(self) -> dict[str, float]:
        totals = {num: total(walks.values()) for num, walks in self.walks.items()}
        greedy = {f"acceptance_length_{num}": walked.acceptance_length for num, walked in totals.items()}
        return greedy | {f"acceptance_length_t1_{num}": walked.acceptance_length_t1 for num, walked in totals.items()}

    def _metrics(self, sums: Tensor) -> dict[str, float]:
        cost = self.meter.read(sums[:, SUMS.index("counted")].tolist())
        sum_of = dict(zip(SUMS, sum_over_ranks(sums.clone()).T.tolist(), strict=True))
        counted = sum_of["counted"]
        metrics: dict[str, float] = {}
        for name in ("kl", "agreement", "prefix_agreement", "overlap", "entropy"):
            for k, (value, number) in enumerate(zip(sum_of[name], counted, strict=True)):
                if number:
                    metrics[f"train/{name}_step_{k}"] = value / number
        if any(counted):  # not if every step was skipped
            losses = zip(sum_of["loss"], counted, strict=True)
            metrics["train/loss"] = sum(value / max(1.0, number) for value, number in losses)
            outside = sum(sum_of["outside_draft_vocab"])
            metrics["train/outside_draft_vocab"] = outside / (outside + sum(counted))
        metrics["train/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        norm = self.engine.get_global_grad_norm()
        if norm is not None and math.isfinite(norm):  # None at stage 0 in float32
            metrics["train/grad_norm"] = float(norm)
        metrics["train/skipped_steps"] = self.state.skipped_steps
        metrics["train/epoch"] = self.state.step * self.packs_per_step / self.data.packs_per_epoch
        return metrics | cost

    def _postfix(self, metrics: dict[str, float]) -> str:
        now = [f"loss {metrics['train/loss']:.3f}"] if "train/loss" in metrics else []
        now += [f"{metrics['train/tokens_per_s']:,.0f} tokens/s"] if metrics else []
        acceptance = {num: total(walks.values()).acceptance_length for num, walks in self.walks.items()}
        return " ".join([*now, *(f"τ@{num} {value:.2f}" for num, value in acceptance.items())])

    def _record(self, walked: bool) -> dict[str, Any]:
        return {
            "verifier": self.data.stores[0].manifest["settings"]["verifier"],
            "verifier_path": self.config.verifier.path,
            "hidden_states": self.data.settings,
            "step": self.state.step,
            "ttt_steps": self.config.train.ttt_steps,
            "heldout": self._acceptance() if walked else {},
        }

    def _tracker(self) -> Tracker:
        assert self.target is not None
        run = self.target.manifest["wandb_run"]
        about = run_description(self.config, self.data.inputs(), self.kernels.record)
        return Tracker(self.config.tracking, self.config.training_folder, self.state.step, run, self.config.name, about)

    def _announce(self) -> None:
        print(
            f"train: {self.num_parameters / 1e6:.1f} M parameters, {self.num_steps} steps of {self.packs_per_step} x "
            f"{self.config.train.batch_tokens} tokens ({self.data.packs_per_epoch} packs an epoch), "
            f"{self.world} process(es), ZeRO {self.config.deepspeed.zero_stage}; {self.data.split}"
            + (f"; going on from step {self.state.step}" if self.state.step else ""),
            flush=True,
        )
