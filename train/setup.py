"""The train stage: a draft head trained by DeepSpeed from the hidden-state store, or next to the verifier."""

import itertools
import json
import math
import secrets
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor

from ..conf.runtime.artifact import Artifact, artifact, digest, find_artifact, write_atomic
from ..conf.runtime.signals import deferred
from ..conf.schema import Config, HeadInit, HiddenStates, OptimizerName, Positions, TrainConfig
from ..data_synthesis.states.verifier_check import check_verifier
from ..models.formats.plain import head_digest, load_head, longest_sample
from ..models.formats.training_folder import checkpoint_steps, head_origin
from ..models.head.architectures import build_head
from ..models.head.config import describe_sizes
from ..models.head.draft_head import DraftHead, initialise
from ..models.head.from_verifier import parameters_of_verifier
from ..models.head.lora import choose_trained, num_parameters
from ..models.kernels.self_check import Checked, require_gpu
from ..models.verifier.config import load_config, logit_transform, warn_if_emulated
from ..models.verifier.weights import VerifierWeights, check_identity
from .checkpoints import load_checkpoint, needs_conversion, save_checkpoint
from .data.online import OnlineStates, load_verifier
from .data.training_data import TrainingData
from .engine import micro_batches, start_engine
from .heldout import acceptance_lengths
from .loop import Trainer
from .loss.kernel_checks import ATTENTION, check_training
from .loss.losses import find_loss
from .loss.rows import PackedBatch
from .loss.unroll import TTTModule
from .metrics.cost import plain_flops
from .metrics.meter import Meter
from .metrics.tracking import Tracker, run_description
from .ranks.group import Ranks, joined
from .regression import check_form, fit_head, num_packs

# Options that change how a run is watched or kept, not what it computes.
_NOT_DETERMINING = (
    *("log_every", "heldout_every", "heldout_samples", "save_every", "keep_checkpoints", "max_skipped_steps"),
    *("num_processes", "data_workers", "collective_timeout_s", "verify_checksums", "checkpoint_activations", "triton"),
    *("stores", "init_from"),  # what is there counts by content
)
# Options of `draft` that came later: unset they are left out of the settings, so that older runs go on.
_LATER = ("norm_before_fc", "attention_bias", "qk_norm", "sliding_window", "window_layers")
# Those of `train`, and what they are then.
_UNSET: list[tuple[str, Any]] = [("optimizer", OptimizerName.adamw), ("muon_lr", None), ("init", HeadInit.random)]
_UNSET += [("init_layer", None), ("positions", Positions.answers), ("patience", None), ("max_forgetting", None)]
_UNSET += [("lora_rank", None)]


def train(config: Config) -> None:
    """Train the draft head on hidden-state stores into runs/<name>/training/; goes on from where it was killed."""
    with joined(config) as ranks:
        _train(config, ranks)


def _train(config: Config, ranks: Ranks) -> None:
    options, folder = config.train, config.training_folder
    micro_batches(options.packs_per_step)  # refused before anything is read
    if options.lora_rank and not options.init_from:  # adapt names one
        raise ValueError("train.init_from is required with train.lora_rank: a trained head, which it changes")
    require_gpu("train.triton", options.triton, ranks.device)
    initial_head, started_from = _initial_head(config, options.init_from) if options.init_from else (None, None)
    shape = initial_head.config if initial_head else check_verifier(config.verifier, config.draft)
    if ranks.rank == 0 and not initial_head:
        print(f"train: the head has an {describe_sizes(config.draft, load_config(config.verifier))}", flush=True)
    with ExitStack() as stack:
        own_store, on_gpu = config.hidden_states_folder, ranks.device.type == "cuda"
        data = TrainingData(options, config.verifier, own_store, shape, ranks.rank, ranks.world, on_gpu)
        stack.enter_context(data)
        head = initial_head or build_head(shape, data.vocabulary)
        check_form(options, shape)
        start = parameters_of_verifier(head, config.verifier, options)  # refused before data is read
        settings = _settings(config, data, head)
        saved = checkpoint_steps(folder / "checkpoints")
        ranks.agree({**settings, "newest checkpoint in runs_dir": saved[-1:]})
        resumed = find_artifact(folder, settings) if saved else None
        if resumed and resumed.complete:
            if ranks.rank == 0:
                print(f"training: {folder} is complete")
            return
        kernels = check_training(options, shape, ranks)
        if options.verify_checksums and not resumed:
            data.verify()
        target = None
        if ranks.rank == 0:
            target = stack.enter_context(artifact(folder, "training", settings, config.overwrite))
        ranks.any_rank(False)  # no rank goes on before the folder is cleared
        trainer = _build_trainer(config, ranks, data, head, start, kernels, target, started_from)
        waits = "it finishes the step, or held-out walk, at work and saves a checkpoint"
        with deferred(waits, then_stop=False) as signals:  # all ranks stop together, or are done
            trainer.run(signals)
            step, ended = trainer.state.step, trainer.state.ended
            if step < trainer.num_steps and not ended:
                stopped = f"training: stopped by {signals.name}, step {step} is saved; the same command goes on"
                if target:
                    print(stopped, flush=True)
                sys.exit(signals.exit_code)
            if target:
                cost = {"tokens": trainer.state.tokens, "seconds": round(trainer.state.seconds)}
                target.finish(steps=step, ended=ended, **cost, heldout=acceptance_lengths(trainer.state.heldout))
                if ended:
                    print(f"training: ends before step {trainer.num_steps}: {ended}")
                print(f"training: step {step} in {folder / 'checkpoints'}; held-out {trainer.summary({})}")


def _initial_head(config: Config, folder: str) -> tuple[DraftHead, str]:
    """Read the head at `train.init_from`, with its draft vocabulary, and where it comes from.

    ValueError: it is of another verifier or `draft`.
    """
    if Path(folder).resolve().is_relative_to(config.training_folder.resolve()):
        raise ValueError(f"train.init_from must lie outside {config.training_folder}, which it would start: copy it")
    head, record = load_head(Path(folder))
    check_identity(record["verifier"], config.verifier, folder, "set the verifier it was trained for")
    has = head.config.options()
    options = {name: option for name, option in asdict(config.draft).items() if name in has and option is not None}
    options["sliding_window"] = config.draft.sliding_window  # null is no window, and not the head's
    if has["window_layers"]:
        options.setdefault("window_layers", list(range(head.config.num_layers)))
    if changes := [f"draft.{name}={json.dumps(has[name])}" for name in options if options[name] != has[name]]:
        raise ValueError(f"draft must describe the head at train.init_from: set {' '.join(changes)}")
    return head, record.get("imported_from") or head_origin(Path(folder))


def _settings(config: Config, data: TrainingData, head: DraftHead) -> dict[str, Any]:
    """Return everything that determines the weights."""
    options, is_online = config.train, config.train.hidden_states is HiddenStates.online
    values = [item for item in asdict(options).items() if item[0] not in _NOT_DETERMINING and item not in _UNSET]
    # What acceptance is measured on, if the training's end depends on what it was at step 0.
    measured = [config.heldout_depth, options.heldout_samples] if options.max_forgetting is not None else None
    return {
        **({"measured": measured} if measured else {}),
        "hidden_states": data.settings,
        **({"verifier_dtype": config.verifier.dtype.value} if is_online else {}),
        "draft_vocabulary": digest(head.target_ids.tolist()),
        "draft": {name: value for name, value in asdict(config.draft).items() if value or name not in _LATER},
        "train": {name: value.value if isinstance(value, Enum) else value for name, value in values},
        "init_from": head_digest(Path(options.init_from)) if options.init_from else None,
    }


def _build_trainer(
    config: Config,
    ranks: Ranks,
    data: TrainingData,
    head: DraftHead,
    start: dict[str, Tensor],
    kernels: Checked,
    target: Artifact | None,
    started_from: str | None,
) -> Trainer:
    """Start the engine, restore the newest checkpoint and, on rank 0, open the records."""
    options, dtype = config.train, getattr(torch, config.train.dtype.value)
    module, embedding, verifier_lm_head = _build_module(config, head, start, ranks.device, ATTENTION in kernels.used)
    every, trained = num_parameters(head)
    online = None
    if options.hidden_states is HiddenStates.online:
        verifier = load_verifier(config.verifier, head.config.aux_layers, ranks.gpus)
        online = OnlineStates(verifier, config.dump.batch_tokens, dtype)
    checkpoints, zero_stage = config.training_folder / "checkpoints", config.deepspeed.zero_stage
    if options.init is HeadInit.regression and not checkpoint_steps(checkpoints):
        _fit(head, data, online, options, ranks, embedding)
    engine = start_engine(module, options, config.deepspeed, needs_conversion(checkpoints, zero_stage))
    ranks.bound_collectives()
    flops = partial(plain_flops, head.config, config.trains_lm_head, lora=bool(options.lora_rank))
    meter = Meter(flops, ranks, dtype, options.ttt_steps)
    state = load_checkpoint(engine, checkpoints)
    num_steps = options.max_steps or max(1, options.epochs * data.packs_per_epoch // options.packs_per_step)
    if target:
        warn_if_emulated("train.dtype", options.dtype, ranks.device)
        print(
            f"train: {trained / 1e6:.1f} of {every / 1e6:.1f} M parameters, {num_steps} steps of "
            f"{options.packs_per_step} x {options.batch_tokens} tokens ({data.packs_per_epoch} packs an epoch), "
            f"{ranks.world} process(es), ZeRO {zero_stage}; {data.split}"
            + (f"; going on from step {state.step}" if state.step else ""),
            flush=True,
        )
    record = {
        "verifier": data.stores[0].manifest["settings"]["verifier"],
        **config.verifier.origin,
        "hidden_states": data.settings,
        **({"started_from": started_from} if started_from else {}),
        "step": 0,  # of each checkpoint, as "heldout"
        "ttt_steps": options.ttt_steps,
        "longest_sample": max(data.split.longest, longest_sample(Path(options.init_from)) if options.init_from else 0),
    }
    return Trainer(
        *(options, num_steps, ranks, data, module, engine, embedding, verifier_lm_head, online, meter, state),
        acceptance=torch.tensor(state.acceptance or [0.0] * options.ttt_steps, device=ranks.device),
        draft_depth=config.heldout_depth,
        save=partial(save_checkpoint, engine, head, checkpoints, record, options.keep_checkpoints),
        tracker=_open_records(config, data, kernels, target, state.step) if target else None,
    )


def _fit(
    head: DraftHead,
    data: TrainingData,
    online: OnlineStates | None,
    options: TrainConfig,
    ranks: Ranks,
    embedding: Tensor,
) -> None:
    """Fit a new head to the states of the first packs, of which this rank reads its share."""
    enough, packs = num_packs(head.config, options.batch_tokens), micro_batches(options.packs_per_step)
    counts = [store.manifest["counts"] for store in data.stores]
    tokens, counted = (sum(one[name] for one in counts) for name in ("tokens", "counted_tokens"))
    rows = 1.0 if options.positions is Positions.all else counted / tokens
    steps, looking_back = (
        math.ceil(min(data.packs_per_epoch, number) / options.packs_per_step) for number in (enough / rows, enough)
    )
    if ranks.rank == 0:
        print(f"train: fits the head to {steps * options.packs_per_step * options.batch_tokens:,} tokens", flush=True)

    def batches() -> Iterator[PackedBatch]:
        for pack in itertools.islice(data.batches(0), steps * packs):
            batch = pack.to(ranks.device, embedding.dtype, 1)
            batch = (online.fill(batch) if online else batch).without_non_finite()
            aux, last = batch.states
            yield replace(batch, aux_hidden_states=aux.float(), last_hidden_state=last.float())

    fit_head(head, batches, embedding, packs, looking_back * packs)


def _build_module(
    config: Config, head: DraftHead, start: dict[str, Tensor], device: torch.device, kernels: bool
) -> tuple[TTTModule, Tensor, Tensor]:
    """Return the module that is trained, a new head initialised, and the verifier's embedding and lm_head."""
    options, dtype = config.train, getattr(torch, config.train.dtype.value)
    weights, transform = VerifierWeights(config.verifier), logit_transform(load_config(config.verifier))
    embedding, verifier_lm_head = weights.embedding(), weights.lm_head()
    matrices = embedding.to(device, dtype), verifier_lm_head.to(device, dtype)
    head = head.to(device)
    if not options.init_from:
        initialise(head, embedding, verifier_lm_head * transform.scale, options.seed)
        head.load_state_dict(start, strict=False)
    choose_trained(head, config.trains_lm_head, options.lora_rank, options.seed)
    loss, recompute = find_loss(options.loss), options.checkpoint_activations
    module = TTTModule(head, options.ttt_steps, options.gamma, loss, transform, options.blend_rate, recompute, kernels)
    return module, *matrices


def _open_records(config: Config, data: TrainingData, kernels: Checked, target: Artifact, step: int) -> Tracker:
    """Write what the run is to its folder, and open its metrics."""
    run = target.manifest.get("wandb_run") or secrets.token_hex(8)
    target.save(complete=False, wandb_run=run, kernels=kernels.record)
    write_atomic(target.folder / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))
    about = run_description(config, data.inputs(), kernels.record)
    return Tracker(config.tracking, target.folder, step, run, config.name, about)
