"""The train stage: a draft head trained by DeepSpeed from the hidden-state store, or beside the verifier."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..conf.artifact import Artifact, artifact, digest, write_atomic
from ..conf.progress import Progress
from ..conf.schema import Config, HiddenStates, TTTLoss
from ..data_synthesis.prompts import is_heldout
from ..data_synthesis.store import VOCABULARY_FILE, HiddenStateStore
from ..models.draft_head import DraftHead, DraftHeadConfig, initialise
from ..models.formats import checkpoint_steps
from ..models.verifier import VerifierWeights, check_identity, load_config, logit_transform
from ..models.vocabulary import VocabularyMap
from .batches import PackStream, collate, pack
from .checkpoints import load_checkpoint, save_checkpoint
from .engine import learning_rate, start_engine, start_processes, stop_processes, sum_over_ranks
from .fused_loss import SUMS
from .heldout import Walks, total, walk_batches
from .online import OnlineStates
from .rows import PackedBatch
from .tracking import Tracker
from .ttt import TTTModule, count_rows, find_targets

# Options that change how a run is watched or kept, not what it computes.
_NOT_DETERMINING = (
    *("log_every", "heldout_every", "save_every", "keep_checkpoints", "num_processes", "verify_checksums"),
    *("checkpoint_activations", "triton"),
)


def train(config: Config) -> None:
    """Train the draft head on runs/<name>/hidden_states/ into runs/<name>/training/; goes on where it was killed."""
    device = start_processes()
    online = config.train.hidden_states is HiddenStates.online
    store = HiddenStateStore(config.hidden_states_folder, with_states=not online)
    if config.train.verify_checksums:
        store.verify(dist.get_rank(), dist.get_world_size())
    head = DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier))
    vocabulary = load_vocabulary(store, head)
    with ExitStack() as stack:
        target = None
        if dist.get_rank() == 0:
            opened = artifact(
                config.training_folder, "training", _settings(config, store, head, vocabulary), config.overwrite
            )
            target = stack.enter_context(opened)
        done = [bool(target and target.complete and checkpoint_steps(target.folder / "checkpoints"))]
        dist.broadcast_object_list(done)
        if done[0]:
            if target:
                print(f"training: {target.folder} is complete")
        else:
            Trainer(config, store, DraftHead(head, vocabulary), device, target).run()
    stop_processes()


def _settings(
    config: Config, store: HiddenStateStore, head: DraftHeadConfig, vocabulary: VocabularyMap
) -> dict[str, Any]:
    """Give everything that determines the weights; refuse a store that contradicts the configuration."""
    recorded = store.manifest["settings"]
    check_identity(recorded["verifier"], config.verifier, str(store.folder), "set the same verifier or dump anew")
    if store.with_states and list(head.aux_layers) != recorded["aux_layers"]:
        raise ValueError(
            f"draft.aux_layers is {list(head.aux_layers)}, {store.folder} holds layers {recorded['aux_layers']}"
        )
    options = {key: value for key, value in dataclasses.asdict(config.train).items() if key not in _NOT_DETERMINING}
    online = {} if store.with_states else {"verifier_dtype": config.verifier.dtype.value}
    return {
        "hidden_states": store.manifest["digest"],
        **online,
        "draft_vocabulary": digest(vocabulary.target_ids.tolist()),
        "draft": dataclasses.asdict(config.draft),
        "train": {key: value.value if isinstance(value, Enum) else value for key, value in options.items()},
        "zero_stage": config.deepspeed.zero_stage,
        "num_processes": dist.get_world_size(),
    }


def load_vocabulary(store: HiddenStateStore, head: DraftHeadConfig) -> VocabularyMap:
    """Read the draft vocabulary that was chosen when the store was dumped."""
    path = store.folder / VOCABULARY_FILE
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}): run `fledge dump` again") from None
    if len(tensors["d2t"]) != head.draft_vocab_size:
        raise ValueError(
            f"draft.vocab_size is {head.draft_vocab_size}, the map in {store.folder} has {len(tensors['d2t'])}: "
            "run `fledge dump` with this option again, only the map is written anew"
        )
    return VocabularyMap(tensors["d2t"], tensors["t2d"])


@dataclass
class Split:
    """Sample numbers of the store by use."""

    train: list[int]
    heldout: list[int]
    too_long: int  # training samples longer than a micro-batch

    @classmethod
    def of(cls, store: HiddenStateStore, batch_tokens: int) -> Split:
        """Split a store by the ids that were held out when it was made."""
        share = store.manifest["settings"]["heldout_share"]
        heldout = [i for i, sample_id in enumerate(store.ids) if is_heldout(sample_id, share)]
        others = sorted(set(range(len(store))) - set(heldout))
        fitting = [i for i in others if store.lengths[i] <= batch_tokens]
        if not fitting:
            raise ValueError(f"no training sample of {store.folder} fits train.batch_tokens={batch_tokens}: raise it")
        return cls(fitting, heldout, len(others) - len(fitting))


class Trainer:
    """One training run: its head, its data, its records."""

    def __init__(
        self, config: Config, store: HiddenStateStore, head: DraftHead, device: torch.device, target: Artifact | None
    ) -> None:
        self.config, self.store, self.device = config, store, device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.target = target  # on rank 0
        self.dtype = getattr(torch, config.train.dtype.value)
        weights = VerifierWeights(config.verifier)
        embedding, verifier_lm_head = weights.embedding(), weights.lm_head()
        self.embedding = embedding.to(device, self.dtype)
        self.verifier_lm_head = verifier_lm_head.to(device, self.dtype)
        self.head = head.to(device)
        transform = logit_transform(load_config(config.verifier))
        initialise(self.head, embedding, verifier_lm_head * transform.scale, config.train.seed)
        self.head.lm_head.weight.requires_grad_(config.draft.train_lm_head)
        self.online = None if store.with_states else OnlineStates.load(config, head.config.aux_layers)
        options = config.train
        self.module = TTTModule(
            self.head,
            options.ttt_steps,
            options.gamma,
            options.loss,
            transform,
            options.blend_rate,
            options.checkpoint_activations,
            options.triton,
        )
        self.engine = start_engine(self.module, config)
        # Running mean (a tenth of each optimizer step) of the probability of acceptance at each draft step, from 0 on:
        # the losses that blend begin as KL.
        self.acceptance = torch.zeros(options.ttt_steps, device=device)

        self.split = Split.of(store, config.train.batch_tokens)
        self.packs = PackStream(store.lengths, self.split.train, config.train.batch_tokens, config.train.seed)
        self.packs_per_step = self.world * config.train.micro_batches
        self.packs_per_epoch = len(self.packs.epoch(0))
        self.num_steps = config.train.max_steps or max(
            1, config.train.epochs * self.packs_per_epoch // self.packs_per_step
        )
        self.draft_lengths = sorted({config.evaluate.num_draft_tokens, config.train.ttt_steps})
        self.heldout_packs = pack(store.lengths, self.split.heldout, max([config.train.batch_tokens, *store.lengths]))
        self.walks: Walks = {}

    def run(self) -> None:
        """Train from the newest checkpoint, or the start, to the last step."""
        folder = self.config.training_folder / "checkpoints"
        state = load_checkpoint(self.engine, folder)
        step = state["step"] if state else 0
        self.walks = state["walks"] if state else {}
        if state:
            self.acceptance = torch.tensor(state["acceptance"], device=self.device)
        if self.target:
            self._announce(step)
            self.target.save(complete=False)
            values = OmegaConf.to_yaml(OmegaConf.structured(self.config))
            write_atomic(self.target.folder / "config.yaml", values)
        tracker = self._tracker(step) if self.rank == 0 else None
        progress = Progress("train", self.num_steps, "step", done=step) if self.rank == 0 else None
        batches = self._batches(step)
        sums = torch.zeros(self.config.train.ttt_steps, len(SUMS), device=self.device)
        tokens, since = 0, time.monotonic()
        while step < self.num_steps:
            micro_batches = list(itertools.islice(batches, self.config.train.micro_batches))
            sums += self._optimizer_step(step, micro_batches)
            tokens += sum(len(batch.input_ids) for batch in micro_batches)
            step += 1
            save = step % self.config.train.save_every == 0 or step == self.num_steps
            if step % self.config.train.log_every == 0 or save:
                metrics = self._metrics(step, sums, tokens / (time.monotonic() - since))
                if tracker and progress is not None:
                    tracker.log(step, metrics)
                    progress.set_postfix_str(self._postfix(metrics), refresh=False)
                sums.zero_()
                tokens, since = 0, time.monotonic()
            if self.heldout_packs and (save or step % self.config.train.heldout_every == 0):
                self._walk_heldout()
                if tracker:
                    tracker.log(step, {f"heldout/{name}": value for name, value in self._acceptance().items()})
            if save:
                state = {"step": step, "walks": self.walks, "acceptance": self.acceptance.tolist()}
                keep = self.config.train.keep_checkpoints
                save_checkpoint(self.engine, self.head, folder, state, self._record(step), keep)
            if progress is not None:
                progress.update()
        if tracker and progress is not None and self.target:
            progress.close()
            tracker.close()
            self.target.finish(steps=self.num_steps, heldout=self._acceptance())
            print(f"training: step {self.num_steps} in {folder}; held-out {self._postfix({})}")

    def _optimizer_step(self, step: int, micro_batches: list[PackedBatch]) -> Tensor:
        """Run forward, backward and the update of one step; give this rank's metric sums.

        N_k is added up over ranks and micro-batches before the first backward, so that the loss does not depend on how
        rows are spread over them. DeepSpeed averages gradients over both, which the factor undoes.
        """
        options = self.config.train
        rows = [batch.useful_rows(options.ttt_steps) for batch in micro_batches]
        targets = [
            find_targets(self.head, batch, here, self.verifier_lm_head, self.module.transform)
            for batch, here in zip(micro_batches, rows, strict=True)
        ]
        num_counted = sum_over_ranks(
            torch.stack([count_rows(*pair) for pair in zip(targets, rows, strict=True)]).sum(0)
        )
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(options, step, self.num_steps)
        sums = torch.zeros(options.ttt_steps, len(SUMS), device=self.device)
        for batch, known in zip(micro_batches, targets, strict=True):
            arguments = known, num_counted, self.acceptance
            loss, batch_sums = self.engine(batch, self.embedding, self.verifier_lm_head, *arguments)
            self.engine.backward(loss * self.packs_per_step)
            self.engine.step()
            sums += batch_sums
        if options.loss in (TTTLoss.lk_lambda, TTTLoss.acceptance_length):
            overlap = sum_over_ranks(sums[:, SUMS.index("overlap")].clone())
            latest = torch.where(num_counted > 0, overlap / num_counted.clamp(min=1), self.acceptance)
            self.acceptance = torch.lerp(self.acceptance, latest, 0.1)
        return sums

    def _batches(self, step: int) -> Iterator[PackedBatch]:
        """Yield this rank's packed batches from a step on: pack i of a step goes to rank i mod ranks."""
        packs = self.packs.start_at(step * self.packs_per_step)
        for samples in itertools.islice(packs, self.rank, None, self.world):
            yield self._batch(samples, self.config.train.ttt_steps)

    def _batch(self, samples: list[int], ttt_steps: int) -> PackedBatch:
        batch = collate(self.store, samples).to(self.device, self.dtype, ttt_steps)
        return self.online.fill(batch) if self.online else batch

    @torch.no_grad()
    def _walk_heldout(self) -> None:
        """Walk the held-out answers; every rank walks them all, since ZeRO-3 needs each in every forward."""
        steps = max(self.draft_lengths)
        batches = (self._batch(samples, steps) for samples in self.heldout_packs)
        self.walks = walk_batches(self.head, batches, self.embedding, self.draft_lengths)

    def _acceptance(self) -> dict[str, float]:
        return {
            f"acceptance_length_{num}": total(walks.values()).acceptance_length for num, walks in self.walks.items()
        }

    def _metrics(self, step: int, sums: Tensor, tokens_per_s: float) -> dict[str, float]:
        sum_of = dict(zip(SUMS, sum_over_ranks(sums.clone()).T.tolist(), strict=True))
        counted = [max(1.0, number) for number in sum_of["counted"]]
        metrics: dict[str, float] = {}
        for name in ("kl", "agreement", "prefix_agreement", "overlap", "entropy"):
            for k, (value, number) in enumerate(zip(sum_of[name], counted, strict=True)):
                metrics[f"train/{name}_step_{k}"] = value / number
        metrics["train/loss"] = sum(value / number for value, number in zip(sum_of["loss"], counted, strict=True))
        outside = sum(sum_of["outside_draft_vocab"])
        metrics["train/outside_draft_vocab"] = outside / max(1.0, outside + sum(sum_of["counted"]))
        metrics["train/lr"] = self.engine.optimizer.param_groups[0]["lr"]
        norm = self.engine.get_global_grad_norm()
        if norm is not None:  # None at stage 0 in float32
            metrics["train/grad_norm"] = float(norm)
        metrics["train/tokens_per_s"] = tokens_per_s * self.world
        metrics["train/epoch"] = step * self.packs_per_step / self.packs_per_epoch
        return metrics

    def _postfix(self, metrics: dict[str, float]) -> str:
        loss = f"loss {metrics['train/loss']:.3f} " if metrics else ""
        return loss + " ".join(f"τ@{name.rpartition('_')[2]} {value:.2f}" for name, value in self._acceptance().items())

    def _record(self, step: int) -> dict[str, Any]:
        return {
            "verifier": self.store.manifest["settings"]["verifier"],
            "verifier_path": self.config.verifier.path,
            "hidden_states": self.store.manifest["digest"],
            "step": step,
            "ttt_steps": self.config.train.ttt_steps,
            "heldout": self._acceptance(),
        }

    def _tracker(self, step: int) -> Tracker:
        assert self.target is not None
        run = digest([self.target.manifest["settings"], self.config.name, str(self.config.training_folder.resolve())])
        values = self.target.manifest["settings"]
        return Tracker(self.config.tracking, self.config.training_folder, step, run, self.config.name, values)

    def _announce(self, step: int) -> None:
        parameters = sum(parameter.numel() for parameter in self.engine.module.parameters())
        print(
            f"train: {parameters / 1e6:.1f} M parameters, {self.num_steps} steps of {self.packs_per_step} x "
            f"{self.config.train.batch_tokens} tokens ({self.packs_per_epoch} packs an epoch), "
            f"{self.world} process(es), ZeRO {self.config.deepspeed.zero_stage}; {len(self.split.train)} training "
            f"and {len(self.split.heldout)} held-out samples, {self.split.too_long} longer than a pack left out"
            + (f"; going on from step {step}" if step else ""),
            flush=True,
        )
