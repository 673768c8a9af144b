"""The layers command: which of the verifier's layers a head should read.

The states of all candidates are recorded once, of a few conversations. Linear heads rank sets of layers: ridge
regression of a position's states, and of the token fed after it, onto the verifier's next logits, all of them randomly
projected. So a set costs one small linear solve. The best sets and the default are then trained for a few steps each,
on the same samples in the same order, and compared on held-out answers, paired by conversation.
"""

from dataclasses import replace
from operator import sub
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor
from torch.nn.functional import rms_norm

from ..conf.runtime.artifact import write_json
from ..conf.runtime.launch import run_alone
from ..conf.schema import Config
from ..conf.schema.free_names import quoted
from ..data_synthesis.store.store import HiddenStateStore
from ..models.formats.engine_forms import ENGINES, ServedHead, obstacles
from ..models.formats.training_folder import best_acceptance_length, head_folder
from ..models.head.config import DraftHeadConfig
from ..models.verifier.config import load_config, load_whole_config
from ..models.verifier.weights import VerifierWeights
from .figures.walks import is_longer, walks_tables

_WIDTH = 128  # to which states and embeddings are projected
_LOGITS = 256  # projected logits
_RIDGE = 1e-2  # of the mean square of a feature
_BEAM = 24
_ROWS = 1024  # that are read at a time
_BY_STATES = ("shard_tokens", "batch_tokens")

Layers = tuple[int, ...]


def layers(config: Config) -> None:
    """Rank sets of aux layers, train the best and the default, and say which to set as draft.aux_layers."""
    options, folder = config.layers, config.run_folder / "layers"
    verifier = load_config(config.verifier)
    candidates = sorted(options.candidates or range(verifier.num_hidden_layers))
    if not set(candidates) <= set(range(verifier.num_hidden_layers)) or len(candidates) < options.size:
        raise ValueError(
            f"layers.candidates must be {options.size} layers of the verifier or more, 0 to "
            f"{verifier.num_hidden_layers - 1}, got {candidates}"
        )
    if not config.data.heldout_share:
        raise ValueError("data.heldout_share must be above 0: sets are judged by held-out conversations")
    head = DraftHeadConfig.from_verifier(config.draft, verifier)
    recorded = sorted({*candidates, *head.aux_layers})
    store = folder / "hidden_states"
    typed = list(HydraConfig.get().overrides.task)
    # A token has many times the states of a store that a head reads: shards and batches are as large as with four.
    sizes = (f"dump.{name}={getattr(config.dump, name) * 4 // (len(recorded) + 1) or 1}" for name in _BY_STATES)
    shared = [*sizes, *typed, f"dump.folder={quoted(store)}", f"dump.limit={options.conversations}"]
    shared += ["train.stores=[]", "train.hidden_states=offline"]  # states of many sets from one pass of the verifier
    run_alone("dump", [*shared, f"draft.aux_layers={recorded}"], 1)
    ranked = rank(HiddenStateStore(store), VerifierWeights(config.verifier), candidates, options.size)
    print(f"layers: linear heads of {len(ranked)} sets; the best:", flush=True)
    for chosen, score in ranked[:5]:
        print(f"  {score:.4f} of the logits' variance  {list(chosen)}", flush=True)
    sets = _different([head.aux_layers, *(chosen for chosen, _ in ranked)])[: options.num_sets + 1]
    steps = [f"train.{name}={options.steps}" for name in ("max_steps", "heldout_every", "save_every")]
    names = {"-".join(map(str, chosen)): chosen for chosen in sets}
    for name, chosen in names.items():
        print(f"layers: trains {list(chosen)} for {options.steps} steps", flush=True)
        checked = ["train.verify_checksums=false"] if name != next(iter(names)) else []  # the first has read the store
        of_set = [*checked, f"runs_dir={quoted(folder)}", f"name='{name}'", f"draft.aux_layers={list(chosen)}"]
        run_alone("train", [*shared, *steps, *of_set], config.train.num_processes)
    trainings = {name: folder / name / "training" for name in names}
    print(*walks_tables(trainings), sep="\n\n")
    default, longest = next(iter(names)), max(trainings, key=lambda name: best_acceptance_length(trainings[name]) or 0)
    ours, theirs = (head_folder(None, trainings[name]) for name in (longest, default))
    by_chance = longest != default and not is_longer(ours, theirs, config.heldout_depth)
    winner = names[default if by_chance else longest]
    kept = f": {list(names[longest])} is not longer beyond chance" * by_chance
    print(f"\nThe best: draft.aux_layers={list(winner)}{' (as it is)' * (winner == head.aux_layers)}{kept}")
    architectures = list(load_whole_config(config.verifier).architectures or [])
    served = ServedHead(replace(head, aux_layers=winner), verifier.num_hidden_layers, architectures)
    for engine in ENGINES:
        for why in obstacles(engine, served):
            print(f"{engine} would not serve it: {why}")
    write_json(
        folder / "layers.json",
        {
            "draft.aux_layers": list(winner),
            "trained": {name: str(place) for name, place in trainings.items()},
            "ranked": [{"aux_layers": list(chosen), "explained": score} for chosen, score in ranked],
        },
    )


def _different(sets: list[Layers]) -> list[Layers]:
    """Return the sets that differ from each before by two layers or more in some place, or in their number."""
    kept: list[Layers] = []
    for one in sets:
        if all(len(one) != len(other) or max(map(abs, map(sub, one, other))) > 1 for other in kept):
            kept.append(one)
    return kept


def rank(
    store: HiddenStateStore, weights: VerifierWeights, candidates: list[int], size: int
) -> list[tuple[Layers, float]]:
    """Return sets of `size` candidates, best first, with the share of the held-out logits' variance they explain.

    Sets are found by beam search. Both shares are of projected logits: what no linear head could know is missing.
    """
    held = [number for number, name in enumerate(store.ids) if name in store.heldout_ids]
    train = [number for number, name in enumerate(store.ids) if name not in store.heldout_ids]
    if not held:
        share = store.manifest["settings"]["heldout_share"]
        raise ValueError(
            f"{store.folder} holds nothing out, which sets are judged by: raise data.heldout_share={share}"
        )
    products = _Products(store, weights, candidates)
    fitted, judged = products.of(train), products.of(held)
    scores: dict[Layers, float] = {}
    beam: list[Layers] = [()]
    for _ in range(size):
        grown = {tuple(sorted((*chosen, layer))) for chosen in beam for layer in candidates if layer not in chosen}
        scores |= {chosen: products.explained(chosen, fitted, judged) for chosen in sorted(grown - scores.keys())}
        beam = sorted(grown, key=lambda chosen: -scores[chosen])[:_BEAM]
    full = [(chosen, score) for chosen, score in scores.items() if len(chosen) == size]
    return sorted(full, key=lambda pair: (-pair[1], pair[0]))


class _Products:
    """Sums of products of features [F] (states of all candidates, then the fed token) and projected logits [L]."""

    def __init__(self, store: HiddenStateStore, weights: VerifierWeights, candidates: list[int]) -> None:
        store.read_layers(candidates)
        generator = torch.Generator().manual_seed(0)
        embedding, lm_head = weights.embedding().float(), weights.lm_head().float()
        vocab_size, hidden = lm_head.shape
        self._store, self._candidates, self._width = store, candidates, min(_WIDTH, hidden)
        self._state = torch.randn(len(candidates), hidden, self._width, generator=generator) / hidden**0.5
        self._token = embedding @ torch.randn(hidden, self._width, generator=generator)
        self._logits = lm_head.T @ torch.randn(vocab_size, _LOGITS, generator=generator)

    def of(self, samples: list[int]) -> dict[str, Tensor]:
        """Return sums over the rows of samples that a head is trained on: products with features, and of targets."""
        sums: dict[str, Any] = {"xx": 0.0, "xy": 0.0, "yy": 0.0, "y": 0.0, "rows": 0}
        for number in samples:
            sample = self._store[number].decoded()
            mask = sample.loss_mask.bool()
            rows = (mask[1:-1] & mask[2:]).nonzero().squeeze(1)  # a state, the token fed after it, and its target
            assert sample.aux_hidden_states is not None
            assert sample.last_hidden_state is not None
            if not (sample.aux_hidden_states.isfinite().all() and sample.last_hidden_state.isfinite().all()):
                continue
            for part in rows.split(_ROWS):
                states = sample.aux_hidden_states[part].float().unflatten(-1, (len(self._candidates), -1))
                features = torch.einsum("tlh,lhw->tlw", rms_norm(states, states.shape[-1:]), self._state).flatten(1)
                token = self._token[sample.input_ids[part + 1].long()]
                x = torch.cat([features, rms_norm(token, token.shape[-1:])], 1)
                y = sample.last_hidden_state[part + 1].float() @ self._logits
                found = {"xx": x.T @ x, "xy": x.T @ y, "yy": y.square().sum(0), "y": y.sum(0), "rows": len(part)}
                sums = {name: sums[name] + value for name, value in found.items()}
        return sums

    def explained(self, chosen: Layers, fitted: dict[str, Tensor], judged: dict[str, Tensor]) -> float:
        """Return the share of the variance that ridge regression on these layers explains."""
        places = [*(self._candidates.index(layer) for layer in chosen), len(self._candidates)]
        columns = torch.cat([torch.arange(place * self._width, (place + 1) * self._width) for place in places])
        products = fitted["xx"][columns][:, columns]
        ridge = torch.eye(len(columns)) * products.diagonal().mean() * _RIDGE
        weights = torch.cholesky_solve(fitted["xy"][columns], torch.linalg.cholesky(products + ridge))
        error = judged["yy"] - 2 * (weights * judged["xy"][columns]).sum(0)
        error = error + (weights * (judged["xx"][columns][:, columns] @ weights)).sum(0)
        variance = judged["yy"] - judged["y"].square() / judged["rows"]
        return float(1 - error.sum() / variance.sum())
