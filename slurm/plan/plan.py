"""The plan command: what a run needs before it begins, and what does not fit. Nothing of the verifier is loaded."""

import itertools
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ...conf.runtime.artifact import write_json
from ...conf.schema import Config, DumpEngine, EvaluateEngine, Gpu, HiddenStates, LastStates, StateDtype
from ...data_synthesis.store.state_format import TOKEN_BYTES
from ...models.formats.plain import CONFIG, plain_config
from ...models.formats.serving_formats import vllm_serve
from ...models.head.config import DraftHeadConfig, describe_sizes
from ...models.verifier.config import verifier_location
from .amounts import Tokens, disk, find_tokens, store_bytes, stored_bytes
from .memory import TrainingShape, peak, training_memory
from .verifier_shape import VerifierShape, planned_head, verifier_shape

GPU_MEMORY_GIB = {Gpu.a100: 79, Gpu.h100: 79, Gpu.h200: 139, Gpu.b200: 178}  # that a process can use
_REHEARSAL = "command with these acceptance rates"
RESERVED = 2 * 2**30  # of a GPU: CUDA's context, NCCL, fragments


def plan(config: Config) -> None:
    """Print the plan of a run, or with plan.json its JSON; plan.save writes plan.json to the run folder."""
    made = make_plan(config)
    if config.plan.save:
        config.run_folder.mkdir(parents=True, exist_ok=True)
        write_json(config.run_folder / "plan.json", made)
    if config.plan.acceptance_rates:
        folder = _untrained_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG, plain_config(planned_head(config), getattr(torch, config.export.dtype.value)))
    print(json.dumps(made, indent=2) if config.plan.json else _table(made))


def make_plan(config: Config) -> dict[str, Any]:
    """Return the plan, its sizes in bytes; ValueError if the conversations or the verifier's sizes are not known."""
    head, verifier, tokens = planned_head(config), verifier_shape(config), find_tokens(config)
    ranks = config.plan.num_nodes * config.plan.ranks_of_node
    shape = TrainingShape(head, config.train, config.deepspeed, tokens.counted_share, ranks, config.trains_lm_head)
    memory = {phase: parts | _other_memory(config, verifier, head) for phase, parts in training_memory(shape).items()}
    gpu_memory = (config.plan.gpu_memory_gib or GPU_MEMORY_GIB[config.plan.gpu]) * 2**30
    made: dict[str, Any] = {
        "name": config.name,
        "verifier": {
            "path": config.verifier.path,
            "sizes from": verifier.source,
            "parameters": verifier.parameters,
            "parameters a token meets": verifier.active,
            "weights": verifier.weight_bytes,
            "weights in transformers": verifier.loaded_bytes,
            "cache of a conversation": round(verifier.cache_bytes(tokens.mean)),
        },
        "head": {
            **dict(zip(("parameters", "trained"), shape.parameters, strict=True)),
            "sizes": describe_sizes(config.draft, verifier.text),
        },
        "tokens": {**asdict(tokens), "mean": tokens.mean},
        "disk": disk(config, tokens, head, shape),
        "gpus": {
            "kind": config.plan.gpu.value,
            "number": config.plan.num_nodes * config.plan.gpus_per_node,
            "memory": round(gpu_memory),
        },
        "training": {
            "ranks": ranks,
            "zero_stage": config.deepspeed.zero_stage,
            "micro_batches": shape.micro_batches,
            "largest phase": peak(memory)[0],
            "memory by phase": memory,
        },
        "choices": {"disk": _store_choices(tokens, head)},
    }
    if config.plan.acceptance_rates:
        made[_REHEARSAL] = _rehearsal(config, config.plan.acceptance_rates)
    return made | {"warnings": list(_warnings(config, made, tokens))}


def _untrained_folder(config: Config) -> Path:
    return config.run_folder / "planned_head"


def _rehearsal(config: Config, rates: list[float]) -> str:
    """Return the command by which vLLM accepts drafts of a head without weights at the given rates."""
    speculative = {
        "method": "eagle3",
        "model": str(_untrained_folder(config)),
        "num_speculative_tokens": len(rates),
        "draft_load_config": {"load_format": "dummy"},
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": rates,
    }
    base = replace(config.verifier, adapter=None)
    return vllm_serve(verifier_location(base), config.verifier.revision, speculative)


def _other_memory(config: Config, verifier: VerifierShape, head: DraftHeadConfig) -> dict[str, int]:
    """Return what the GPU of a rank holds besides its training: online the verifier, spread over the rank's GPUs."""
    parts = {"reserved: CUDA, NCCL, fragments": RESERVED}
    if config.train.hidden_states is HiddenStates.offline:
        return parts
    gpus = config.plan.gpus_per_node // config.plan.ranks_of_node
    forward = verifier.forward_bytes(max(config.dump.batch_tokens, config.train.batch_tokens), len(head.aux_layers))
    return parts | {"verifier's weights": verifier.loaded_bytes // gpus, "verifier's forward, estimated": forward}


def _store_choices(tokens: Tokens, head: DraftHeadConfig) -> dict[str, int]:
    """Return the bytes of a store by format, and of what online training needs."""
    stores = {}
    for dtype, last in itertools.product((StateDtype.bfloat16, StateDtype.float8), LastStates):
        size = tokens.tokens * store_bytes(head, tokens, dtype, last)
        stores[f"offline, dump.dtype={dtype.name} last_states={last.value}"] = round(size)
    return stores | {"online: tokens only": TOKEN_BYTES * tokens.tokens}


def _warnings(config: Config, made: dict[str, Any], tokens: Tokens) -> Iterator[str]:
    """Yield a sentence for each thing that does not fit, with the option to change."""
    train, dump, memory, usable = config.train, config.dump, made["training"]["memory by phase"], made["gpus"]["memory"]
    phase, needed = peak(memory)
    if needed > usable:
        largest = max(memory[phase], key=lambda part: memory[phase][part])
        fits = f"training needs {_size(needed)} of a GPU's {_size(usable)} in its {phase} phase"
        yield f"{fits}, most of it {largest}: {_cure(config, largest)}"
    packs, ranks = train.packs_per_step, made["training"]["ranks"]
    if packs % ranks:
        cure = f"set it to {-(-packs // ranks) * ranks}"
        yield f"train.packs_per_step={packs} must be a multiple of the {ranks} ranks: {cure}"
    weights, node = made["verifier"]["weights"], usable * config.plan.gpus_per_node
    if weights > 0.9 * node:
        yield (
            f"the verifier's weights are {_size(weights)}, a node's GPUs have {_size(node)}: serve it over several "
            "nodes, or set verifier.path to a quantised checkpoint"
        )
    elif dump.engine is DumpEngine.vllm and "tensor_parallel_size" not in dump.vllm_options and weights > 0.9 * usable:
        yield "dump.vllm_options has no tensor_parallel_size, and the verifier does not fit one GPU: set it"
    loaded = made["verifier"]["weights in transformers"]
    if loaded > 0.9 * node and config.evaluate.engine is not EvaluateEngine.server:
        yield (
            f"evaluation in this process needs the verifier's weights as transformers loads them, {_size(loaded)}"
            f"{' dequantised' if loaded > weights else ''}, and a node's GPUs have {_size(node)}: "
            "set evaluate.engine=server"
        )
    there = 0 if config.plan.disk_tb else stored_bytes(config)
    if (total := sum(made["disk"].values()) - there) > (free := _free(config)):
        yield (
            f"the run needs {_size(total)} of disk and {_size(free)} are free: set dump.dtype=float8 and "
            "dump.last_states=counted, train.hidden_states=online, dump.folder to a larger disk, or fewer conversations"
        )
    if tokens.mean > train.batch_tokens:
        yield (
            f"a conversation has {tokens.mean:.0f} tokens on average, and what is longer than "
            f"train.batch_tokens={train.batch_tokens} is cut or dropped: raise it"
        )


def _cure(config: Config, largest: str) -> str:
    if largest.startswith("verifier's weights"):
        if config.plan.ranks_of_node > 1:
            return "set plan.ranks_per_node lower, so that a rank has more GPUs, or train.hidden_states=offline"
        smaller = config.train.checkpoint_activations and config.deepspeed.offload_optimizer
        saving = "" if smaller else "train.checkpoint_activations=true and deepspeed=zero2_offload, or "
        return f"set {saving}train.hidden_states=offline, or take larger GPUs (plan.gpu) or more a node"
    if largest.startswith("activations") and not config.train.checkpoint_activations:
        return "set train.checkpoint_activations=true, or train.batch_tokens lower"
    if largest.startswith("packed"):
        return "set train.packs_per_step lower, or start more ranks"
    if config.deepspeed.zero_stage < 2:
        return "set deepspeed=zero2, or deepspeed=zero3"
    return "set train.batch_tokens lower, deepspeed=zero2_offload, or draft.vocab_size to a part of the vocabulary"


def _free(config: Config) -> float:
    if config.plan.disk_tb is not None:
        return config.plan.disk_tb * 1e12
    folder = config.hidden_states_folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def _size(number: float) -> str:
    """Return bytes in the unit that suits: GiB for memory and disk, TiB from a thousand on."""
    if number >= 1000 * 2**30:
        return f"{number / 2**40:.2f} TiB"
    return f"{number / 2**30:.2f} GiB" if number >= 2**28 else f"{number / 2**20:.1f} MiB"


def _count(number: float) -> str:
    return f"{number / 1e9:.2f} G" if number >= 1e9 else f"{number / 1e6:.1f} M"


def _table(made: dict[str, Any]) -> str:
    verifier, tokens, training, gpus = made["verifier"], made["tokens"], made["training"], made["gpus"]
    phase = training["largest phase"]
    of_training = f"ZeRO {training['zero_stage']}, {training['ranks']} ranks, {training['micro_batches']} packs each"
    lines = [
        f"plan of {made['name']}",
        f"  verifier      {verifier['path']}: {_count(verifier['parameters'])} parameters, of which a token meets "
        f"{_count(verifier['parameters a token meets'])}; weights {_size(verifier['weights'])} "
        f"(sizes from {verifier['sizes from']})",
        f"  head          {_count(made['head']['parameters'])} parameters, {_count(made['head']['trained'])} trained",
        f"                {made['head']['sizes']}",
        f"  tokens        {_count(tokens['tokens'])} in {tokens['conversations']:,} conversations, "
        f"{_count(tokens['counted'])} written by the verifier ({tokens['source']})",
        f"  GPUs          {gpus['number']} x {gpus['kind']}, {_size(gpus['memory'])} each",
        *_rows("disk", made["disk"]),
        _row("in all", sum(made["disk"].values())),
        *_rows(
            f"memory of a GPU in training ({of_training}; largest phase: {phase})", training["memory by phase"][phase]
        ),
        _row("in all", peak(training["memory by phase"])[1]),
        *_rows("disk of the hidden states, by choice", made["choices"]["disk"]),
        *(["", _REHEARSAL, made[_REHEARSAL]] if _REHEARSAL in made else []),
        "",
        *([f"warning: {sentence}" for sentence in made["warnings"]] or ["nothing to warn of: all of it fits"]),
    ]
    return "\n".join(lines)


def _rows(title: str, sizes: dict[str, int]) -> list[str]:
    return ["", title, *(_row(name, size) for name, size in sizes.items() if size)]


def _row(name: str, size: float) -> str:
    return f"  {name:<58} {_size(size):>12}"
