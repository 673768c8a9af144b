"""The inspect command: what a hidden-state store holds, of which verifier, and whether it is sound."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..conf.runtime.artifact import differences, read_manifest
from ..conf.runtime.progress import Progress
from ..conf.schema import Config, VerifierConfig
from ..models.verifier.config import load_tokenizer, tokenizer_identity
from .heldout import is_heldout
from .preview import marked_text, printable, terminal_mark
from .store.shard import Sample, shard_name
from .store.state_format import decode
from .store.store import TOKENS_FOLDER, HiddenStateStore
from .tokens.chat_template import Sequence
from .tokens.tokenise import left_out

RECORDED = "recorded"  # verifier.path of this command, unless another is given: the store's own
_SCANNED = 64  # samples whose states are measured
_SHOWN_TOKENS = 400


def inspect_store(config: Config) -> None:
    """Print what the store inspect.store, or the run's, holds; exit code 1 where something is wrong with it.

    Raises:
        ValueError: it is no store, or a file is missing, truncated or altered (named).
    """
    options = config.inspect
    folder = Path(options.store) if options.store else config.hidden_states_folder
    manifest = read_manifest(folder, "hidden_states", unfinished=True)
    _print_facts(_facts(folder, manifest))
    if not manifest["complete"]:
        _print_facts({"not complete": _progress(folder)})
        return
    store = HiddenStateStore(folder, with_states=manifest["settings"].get("states", True))
    _print_facts(_statistics(store))
    wrong = _verify(store) if options.verify else []
    _print_facts({"checksums": "all right" if options.verify else "not compared (inspect --verify)"})
    if store.with_states:
        wrong_of_some, read = _print_states(store)
        of = f"of all {len(store)}" if options.verify else f"of those with {read} tokens that were read"
        wrong = wrong if options.verify else wrong_of_some
        _print_facts({"finite": f"{len(wrong)} samples are not, {of}"})
    _print_sample(config, store)
    if wrong:
        print(f"\nnot finite: {', '.join(wrong[:20])}{' ...' if len(wrong) > 20 else ''}")
        sys.exit(1)


def _verify(store: HiddenStateStore) -> list[str]:
    """Compare all checksums; give the samples whose states are not finite."""
    wrong: list[str] = []
    progress = Progress("checksums", len(store.entries), "shard")
    for number in range(len(store.entries)):
        store.verify(number, len(store.entries))
        if store.with_states:
            wrong += store.not_finite(number)
        progress.update()
    progress.close()
    return wrong


def _print_facts(facts: dict[str, str]) -> None:
    for name, value in facts.items():
        print(f"{name:<13} {printable(value)}")


def _facts(folder: Path, manifest: dict[str, Any]) -> dict[str, str]:
    settings = manifest["settings"]
    verifier = settings["verifier"]
    states = "none: tokens for online training"
    if settings.get("states", True):
        layers = ", ".join(map(str, settings["aux_layers"]))
        states = (
            f"{settings['state_dtype']}, of decoder layers {layers} (0-based) and the last, normed, at "
            f"{settings['last_states']} positions; computed in {settings['verifier_dtype']} by {settings['engine']}"
        )
    return {
        "store": str(folder),
        "verifier": f"{manifest.get('verifier_path')}: {verifier['num_layers']} layers, width "
        f"{verifier['hidden_size']}, {verifier['vocab_size']} tokens, fingerprint {verifier['fingerprint']}",
        "tokenizer": f"{verifier['tokenizer']}, chat template {verifier['chat_template']}",
        "states": states,
    }


def _progress(folder: Path) -> str:
    """Say how far an unfinished store is."""
    try:
        plan = read_manifest(folder / TOKENS_FOLDER, "hidden_states")["shards"]
    except ValueError:
        return "the conversations are being tokenised; `fledge dump` goes on"
    there = sum((folder / shard_name(number)).is_file() for number in range(len(plan)))
    writers = len(list(folder.glob("writer-*")))
    return f"{there} of {len(plan)} shards are there, {writers} writers at work or stopped; `fledge dump` goes on"


def _statistics(store: HiddenStateStore) -> dict[str, str]:
    counts, share = store.manifest["counts"], store.manifest["settings"]["heldout_share"]
    heldout = sum(is_heldout(name, share) for name in store.ids)
    lengths = sorted(store.lengths)
    images = sum(number > 0 for number in store.num_images)
    return {
        "size": f"{counts['bytes'] / 2**30:.3f} GiB in {len(store.entries)} shards, "
        f"{counts['bytes'] / counts['tokens'] / 1000:.3g} kB a token",
        "samples": f"{len(store)} of {counts['conversations']} conversations, {heldout} held out, {images} with images",
        "tokens": f"{counts['tokens']}, of which the verifier wrote {counts['counted_tokens']} "
        f"({counts['counted_tokens'] / counts['tokens']:.1%})",
        "length": f"{lengths[0]} to {lengths[-1]}, median {lengths[len(lengths) // 2]}, "
        f"mean {statistics.fmean(lengths):.1f}, 95 % up to {lengths[int(0.95 * (len(lengths) - 1))]}",
        "left out": left_out(counts, store.manifest["settings"]["max_length"]),
    }


def _spread(num_samples: int) -> Iterable[int]:
    """Choose samples from all over a store."""
    return sorted({number * num_samples // _SCANNED for number in range(_SCANNED)})


def _print_states(store: HiddenStateStore) -> tuple[list[str], int]:
    """Print the size of the states of some samples, layer by layer; give those not finite, and the others' tokens."""
    layers = store.manifest["settings"]["aux_layers"]
    squares, largest = torch.zeros(len(layers) + 1, dtype=torch.float64), torch.zeros(len(layers) + 1)
    rows = torch.zeros(len(layers) + 1, dtype=torch.int64)
    wrong: list[str] = []
    read = 0
    for index in _spread(len(store)):
        sample = store[index]
        states = _by_layer(sample, len(layers))
        if not all(part.isfinite().all() for part in states):
            wrong.append(sample.id)
            continue
        read += len(sample.input_ids)
        for number, part in enumerate(states):
            squares[number] += part.double().square().mean(-1).sum()
            largest[number] = max(largest[number], part.abs().max()) if len(part) else largest[number]
            rows[number] += len(part)
    for name, square, count, most in zip([*map(str, layers), "last"], squares, rows, largest, strict=True):
        print(f"{'layer ' + name if name != 'last' else 'last state':<13} ", end="")
        print(f"root mean square {(square / count.clamp(min=1)).sqrt():.3g}, largest {most:.3g}")
    return wrong, read


def _by_layer(sample: Sample, num_layers: int) -> list[Tensor]:
    """Give the states of each aux layer and the last ones [T, H], in float32, but for last ones that were not kept."""
    assert sample.aux_hidden_states is not None
    assert sample.last_hidden_state is not None
    aux = decode(sample.aux_hidden_states, sample.aux_scale, torch.float32).unflatten(-1, (num_layers, -1))
    last = decode(sample.last_hidden_state, sample.last_scale, torch.float32)
    return [*aux.unbind(1), last[last.abs().amax(-1) > 0] if last.isfinite().all() else last]


def _print_sample(config: Config, store: HiddenStateStore) -> None:
    """Print a sample as text, what the verifier wrote marked; where its tokenizer is not at hand, say so."""
    wanted = config.inspect.sample
    if wanted is not None and wanted not in store.ids:
        raise ValueError(f"inspect.sample: {store.folder} holds no sample {wanted!r}: without it the first is shown")
    sample = store[store.ids.index(wanted) if wanted is not None else 0]
    revision = store.manifest.get("verifier_revision")
    path = config.verifier.path if config.verifier.path != RECORDED else store.manifest["verifier_path"]
    try:
        named = config.verifier if path == config.verifier.path else VerifierConfig(path, revision)
        tokenizer = load_tokenizer(replace(named, chat_template_kwargs=config.verifier.chat_template_kwargs))
    except ValueError as error:
        print(f"\nsample {printable(sample.id)} is not decoded: {error}")
        return
    own, recorded = tokenizer_identity(tokenizer), store.manifest["settings"]["verifier"]
    if changes := differences({name: recorded[name] for name in own}, own):
        print(f"the tokenizer of {path} is another than the store's ({'; '.join(changes)})")
    tokens = sample.input_ids.tolist() if wanted is not None else sample.input_ids[:_SHOWN_TOKENS].tolist()
    rest = len(sample.input_ids) - len(tokens)
    print(f"\nsample {printable(sample.id)}, {len(sample.input_ids)} tokens\n")
    text = marked_text(tokenizer, Sequence(tokens, _runs(sample.loss_mask[: len(tokens)])), terminal_mark())
    print(text + (f" ... and {rest} tokens (inspect.sample={sample.id} shows all)" if rest else ""))


def _runs(loss_mask: Tensor) -> list[tuple[int, int]]:
    """Give the spans [start, end) in which a mask is 1."""
    runs, start = [], 0
    for produced, run in itertools.groupby(loss_mask.tolist()):
        end = start + len(list(run))
        if produced:
            runs.append((start, end))
        start = end
    return runs
