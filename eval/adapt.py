"""The adapt command: a head goes on with texts of one's own, or with a verifier that was tuned.

The stages run in processes of their own: import, synthesize, dump, train from that head next to stores of what it must
go on to do, export. What the head gained on its own texts and lost on the others is said with intervals, paired by
conversation: held-out answers, before the first step and at the best checkpoint.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ..conf.runtime.artifact import write_atomic
from ..conf.runtime.launch import run_alone
from ..conf.schema import Config, StoreConfig
from ..conf.schema.free_names import quoted
from ..data_synthesis.heldout import is_heldout
from ..data_synthesis.states.own_words import foreign_samples
from ..data_synthesis.store.store import HiddenStateStore
from ..models.formats.plain import load_head
from ..models.formats.training_folder import checkpoint_steps, head_folder
from ..models.import_head import import_folder
from .figures.metrics import FEWEST
from .figures.walks import tables

_REPORT = "adaptation.md"
_FEW = 0.05  # of the conversations: as many may be flagged by chance
_MEASUREMENTS = 10  # of a training: what is kept is the best of so many checkpoints


def adapt(config: Config) -> None:
    """Train `adapt.head` on the run's own prompts, export it, and write what it gained and lost."""
    options, source = config.adapt, _source(config.adapt.head)
    if not config.data.heldout_share:
        raise ValueError("data.heldout_share must be above 0: gain is measured on held-out conversations")
    typed = list(HydraConfig.get().overrides.task)
    own = StoreConfig(str(config.hidden_states_folder))
    run_alone("import", [*typed, f"head_import.source={quoted(source)}"])
    head = import_folder(config.run_folder, source)
    # Before what was typed: training refuses a `draft` that describes another head.
    shared = [f"draft.{name}={_written(value)}" for name, value in load_head(head)[0].config.options().items()] + typed
    for stage in ("synthesize", "dump"):
        run_alone(stage, shared)
    stores = [own, *options.replay]
    opened = [HiddenStateStore(Path(store.folder), with_states=False) for store in stores]
    heldout = _heldout_ids(opened)
    if (num_heldout := len(heldout[0])) < FEWEST:
        raise ValueError(
            f"adapt measures gain on {FEWEST} held-out conversations of its own or more, and has {num_heldout}: raise "
            "data.heldout_share or data.limit, under another name or with overwrite=true"
        )
    foreign = _foreign(config, opened[0])
    print(f"adapt: {foreign}", flush=True)
    every = _steps_between(config, [store.weight for store in stores], opened)
    shared = [f"train.{name}={every}" for name in ("save_every", "heldout_every")] + shared
    values = {"init_from": str(head), "init": "random", "stores": stores, "patience": options.patience}
    values |= {"max_forgetting": options.max_forgetting} if options.replay else {}
    training = [f"train.{name}={_written(value)}" for name, value in values.items()]
    run_alone("train", [*shared, *training], config.train.num_processes)
    run_alone("export", [*shared, *training])
    report = adaptation(config.training_folder, stores, heldout, str(options.head)) + f"\n{foreign}\n"
    write_atomic(config.run_folder / _REPORT, report)
    print(f"{report}\nadaptation: {config.run_folder / _REPORT}")


def _source(head: str | None) -> str:
    """Return the folder or hub id of the head to start from; of a run its best checkpoint."""
    if head is None:
        raise ValueError("adapt.head is required: a run, a checkpoint, an export, or a published head's folder or id")
    training = Path(head) / "training"
    return str(head_folder(None, training)) if checkpoint_steps(training / "checkpoints") else head


def _foreign(config: Config, own: HiddenStateStore) -> str:
    """Say how many of its own texts the verifier would hardly have written, of which a head learns less."""
    if not own.manifest["settings"].get("states", True):
        return "Whether answers could be the verifier's own words was not looked at: the store has no states."
    temperature = config.synthesize.temperature
    found, looked = foreign_samples(HiddenStateStore(own.folder), config.verifier, temperature)
    said = (
        f"Of {looked} conversations that were looked at, {len(found)} hold answers that the verifier would hardly have "
        f"written at synthesize.temperature={temperature}."
    )
    if len(found) <= _FEW * looked:
        return said
    return (
        f"{said} Such are {', '.join(found[:3])}. If they were logged, data.logged_answers=false lets it answer anew."
    )


def _steps_between(config: Config, weights: list[float], stores: list[HiddenStateStore]) -> int:
    """Return after how many steps to save and measure, unless it is typed: a tenth of all."""
    options = config.train
    tokens = sum(weight * sum(store.lengths) for weight, store in zip(weights, stores, strict=True))
    steps = options.max_steps or options.epochs * tokens / (options.batch_tokens * options.packs_per_step)
    return max(1, round(steps / _MEASUREMENTS))


def _heldout_ids(stores: list[HiddenStateStore]) -> list[set[str]]:
    """Return what each store holds out; an id that several do is the first one's, as in training."""
    seen, by_store = set[str](), list[set[str]]()
    for store in stores:
        share = store.manifest["settings"]["heldout_share"]
        by_store.append({name for name in store.ids if is_heldout(name, share)} - seen)
        seen |= by_store[-1]
    return by_store


def _written(value: Any) -> str:
    """Write a value as that of an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, StoreConfig):
        return f"{{{','.join(f'{name}: {_written(part)}' for name, part in asdict(value).items())}}}"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value)


def adaptation(training: Path, stores: list[StoreConfig], heldout: list[set[str]], head: str) -> str:
    """Return the report: acceptance on what each store holds out, of the head at its start and at its best."""
    best = head_folder(None, training)
    checkpoints = {"before": training / "checkpoints" / "step-0", "after": best}
    parts = [f"# Adaptation of {head}", f"The best checkpoint is {best.name}."]
    if best.name == "step-0":
        parts.append("**Nothing was gained: the head stays as it was.**")
    for number, (store, ids) in enumerate(zip(stores, heldout, strict=True)):
        parts += [
            f"## {'Its own texts' if not number else 'What it could before'}: {store.folder}",
            *tables(checkpoints, ids),
        ]
    return "\n\n".join(parts) + "\n"
