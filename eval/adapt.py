"""The adapt command: a head goes on with texts of one's own, or with a verifier that was tuned.

The stages run in processes of their own: import, synthesize, dump, train from that head next to stores of what it must
go on to do, export. What the head gained on its own texts and lost on the others is said with intervals, paired by
conversation: held-out answers, before the first step and at the best checkpoint.
"""

import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ..conf.runtime.artifact import digest, read_manifest, write_atomic, write_json
from ..conf.runtime.launch import run_alone
from ..conf.schema import SELF, Config, HiddenStates, StoreConfig
from ..conf.schema.free_names import quoted
from ..data_synthesis.heldout import conversation_id, is_heldout
from ..data_synthesis.prompts.prepare import prepare_prompts
from ..data_synthesis.states.own_words import foreign_samples
from ..data_synthesis.store.store import HiddenStateStore
from ..models.formats.plain import load_head
from ..models.formats.training_folder import LATEST, checkpoint_steps, head_folder
from ..models.head.config import DraftHeadConfig
from ..models.import_head import import_folder
from ..models.verifier.weights import verifier_identity
from ..train.data.training_data import check_store
from .figures.metrics import FEWEST
from .figures.walks import by_group, is_longer, tables

_REPORT, _SOURCE = "adaptation.md", "adapt.json"
_SETS = ("patience", "stores", "init_from", "init", "init_layer", "max_forgetting")  # of `train`
_FEW = 0.05  # of the conversations: as many may be flagged by chance
_MEASUREMENTS = 10  # of a training: what is kept is the best of so many checkpoints


def adapt(config: Config) -> None:
    """Train `adapt.head` on the run's own prompts, export it, and write what it gained and lost."""
    options, typed = config.adapt, list(HydraConfig.get().overrides.task)
    source, goes_on = _source(config)
    if fixed := [word for word in typed if word.lstrip("+~").partition("=")[0] in {f"train.{name}" for name in _SETS}]:
        raise ValueError(f"adapt sets {fixed[0].partition('=')[0]} itself: leave it out; see the options of `adapt`")
    if not config.data.heldout_share:
        raise ValueError("data.heldout_share must be above 0: gain is measured on held-out conversations")
    if config.verifier.tensor_parallel:
        raise ValueError("verifier.tensor_parallel must be false: adapt starts its stages as single processes")
    own = StoreConfig(str(config.hidden_states_folder))
    head = _imported(config, source, goes_on, typed)
    shape = load_head(head)[0].config
    _check(config, shape, typed)
    shared = [f"draft.{name}={_written(value)}" for name, value in shape.options().items()] + typed
    for stage in ("synthesize", "dump"):
        run_alone(stage, shared)
    stores = [own, *options.replay]
    opened = [HiddenStateStore(Path(store.folder), with_states=False) for store in stores]
    heldout = _heldout_ids(opened)
    _require_heldout(heldout[0])
    notes = [_foreign(config, opened[0]), *_seen(opened, options.replay, heldout[0])]
    print(*(f"adapt: {note}" for note in notes), sep="\n", flush=True)
    every = _steps_between(config, stores, opened)
    shared = [f"train.{name}={every}" for name in ("save_every", "heldout_every")] + shared
    values: dict[str, Any] = {"init_from": str(head), "init": "random", "init_layer": None, "stores": stores}
    floor = options.max_forgetting if options.replay else None
    if floor is None and any(heldout[1:]):
        floor = config.heldout_depth + 1.0  # which nothing reaches: without one, other stores' texts would count, too
    values |= {"patience": options.patience, "max_forgetting": floor}
    training = [f"train.{name}={_written(value)}" for name, value in values.items()]
    (config.run_folder / _REPORT).unlink(missing_ok=True)
    run_alone("train", [*shared, *training], config.train.num_processes)
    run_alone("export", [*shared, *training])
    report = "\n\n".join([*adaptation(config, stores, heldout), *notes]) + "\n"
    write_atomic(config.run_folder / _REPORT, report)
    print(f"{report}\nadaptation: {config.run_folder / _REPORT}")


def _source(config: Config) -> tuple[str, bool]:
    """Return the folder or hub id of the head to start from, and whether adapt had read it before it was stopped.

    Of a run it is the best checkpoint when adapt first started.
    """
    head, record = config.adapt.head, config.run_folder / _SOURCE
    if head is None:
        raise ValueError("adapt.head is required: a run, a checkpoint, an export, or a published head's folder or id")
    path = Path(head).resolve()
    if path == config.run_folder.resolve() or path.is_relative_to(config.training_folder.resolve()):
        raise ValueError(f"adapt.head {head!r} is of this very run, whose training would replace it: give another name")
    anew = False
    if config.overwrite:
        with suppress(ValueError):
            anew = bool(read_manifest(config.training_folder, "training"))  # a whole one, to be made again
    if record.is_file() and not anew and (known := json.loads(record.read_text())).items() >= _asked(config).items():
        return str(known["source"]), True
    training = Path(head) / "training"
    return str(head_folder(None, training)) if checkpoint_steps(training / "checkpoints") else head, False


def _imported(config: Config, source: str, goes_on: bool, typed: list[str]) -> Path:
    """Return the folder of the head as it was imported, which is done now unless it was done before it was stopped."""
    folder = import_folder(config.run_folder, source)
    if folder.resolve() == Path(source).resolve():
        return folder
    with suppress(ValueError):  # of another verifier
        if goes_on and read_manifest(folder, "import")["settings"]["verifier"] == verifier_identity(config.verifier):
            return folder  # its source may be another one by now, or gone
    run_alone("import", [*typed, f"head_import.source={quoted(source)}"])
    write_json(config.run_folder / _SOURCE, {**_asked(config), "source": source})
    return folder


def _asked(config: Config) -> dict[str, Any]:
    return {"head": config.adapt.head, "head_import": str(asdict(config.head_import))}


def _check(config: Config, shape: DraftHeadConfig, typed: list[str]) -> None:
    """Refuse what training would refuse, before the verifier answers."""
    given = {word.lstrip("+").partition("=")[0] for word in typed}
    for name, value in shape.options().items():
        if f"draft.{name}" in given and getattr(config.draft, name) != value:
            raise ValueError(f"draft must describe the head at adapt.head: set draft.{name}={_written(value)}")
    offline = config.train.hidden_states is HiddenStates.offline
    stores = [HiddenStateStore(Path(store.folder), with_states=offline) for store in config.adapt.replay]
    for store in stores:
        check_store(store, config.train, config.verifier, shape)
    for store, ids in zip(stores, _heldout_ids(stores), strict=True):
        if not ids and config.adapt.max_forgetting is not None:
            raise ValueError(
                f"adapt.replay: {store.folder} holds nothing out on which forgetting could be measured: dump it with "
                "data.heldout_share above 0, or set adapt.max_forgetting=null"
            )
    if all(source.path != SELF for source in config.data.sources):
        share = config.data.heldout_share
        _require_heldout({prompt.id for prompt in prepare_prompts(config).read() if is_heldout(prompt.id, share)})


def _require_heldout(ids: set[str]) -> None:
    if (number := len({conversation_id(name) for name in ids})) < FEWEST:
        raise ValueError(
            f"adapt measures gain on {FEWEST} held-out conversations of its own or more, and has {number}: raise "
            "data.heldout_share or data.limit, under another name or with overwrite=true"
        )


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
    cure = "If they were logged, data.logged_answers=false overwrite=true lets it answer anew."
    return f"{said} Such are {', '.join(found[:3])}. {cure}"


def _seen(stores: list[HiddenStateStore], replay: list[StoreConfig], heldout: set[str]) -> list[str]:
    """Say how many held-out conversations begin as one does that is trained on; nothing if none does."""
    mine = {name: _beginning(stores[0], number) for number, name in enumerate(stores[0].ids) if name in heldout}
    others = set[str]()
    for store, options in zip(stores[1:], replay, strict=True):
        if options.weight:
            others |= {_beginning(store, n) for n, name in enumerate(store.ids) if name not in store.heldout_ids}
    if not (number := sum(beginning in others for beginning in mine.values())):
        return []
    return [
        f"{number} of the {len(mine)} held-out conversations begin with a prompt that adapt.replay trains on, so that "
        "the gain is measured too high: leave such prompts out (data.exclude)."
    ]


def _beginning(store: HiddenStateStore, number: int) -> str:
    """Return a digest of a sample's tokens before its first answer."""
    sample = store[number]
    return digest(sample.input_ids[: int(sample.loss_mask.argmax())].tolist())


def _steps_between(config: Config, stores: list[StoreConfig], opened: list[HiddenStateStore]) -> int:
    """Return after how many steps to save and measure, unless it is typed: a tenth of all."""
    options, tokens = config.train, 0.0
    for store, at in zip(stores, opened, strict=True):
        tokens += store.weight * sum(at.lengths) * min(1.0, (store.limit or len(at)) / len(at))
    steps = options.max_steps or options.epochs * tokens / (options.batch_tokens * options.packs_per_step)
    return max(1, round(steps / _MEASUREMENTS))


def _heldout_ids(stores: list[HiddenStateStore]) -> list[set[str]]:
    """Return what each store holds out; an id that several do is the first one's, as in training."""
    seen, by_store = set[str](), list[set[str]]()
    for store in stores:
        by_store.append(store.heldout_ids - seen)
        seen |= by_store[-1]
    return by_store


def _written(value: Any) -> str:
    """Write a value as that of an override."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    if isinstance(value, StoreConfig):
        return f"{{{','.join(f'{name}: {_written(part)}' for name, part in asdict(value).items())}}}"
    return quoted(value) if isinstance(value, str) else "null" if value is None else str(value)


def adaptation(config: Config, stores: list[StoreConfig], heldout: list[set[str]]) -> list[str]:
    """Return the report's parts: acceptance on what each store holds out, of the head at its start and at its best."""
    training, depth = config.training_folder, config.heldout_depth
    manifest, best = read_manifest(training, "training"), head_folder(None, training)
    start, last = training / "checkpoints" / "step-0", head_folder(LATEST, training)
    checkpoints = {"before": start, "after": best} | ({"at the end": last} if last != best else {})
    origin = {name.removeprefix("verifier_"): value for name, value in config.verifier.origin.items() if value}
    verifier = ", ".join(f"{name} {value}" for name, value in origin.items())
    cost = f"{manifest.get('tokens', 0):,} tokens, {manifest.get('seconds', 0) / 60:.1f} minutes"
    parts = [
        f"# Adaptation of {config.adapt.head}",
        f"- head: {load_head(best)[1].get('started_from')}\n"
        f"- verifier: {verifier}, fingerprint {verifier_identity(config.verifier)['fingerprint']}\n"
        f"- trained: {manifest['steps']} steps, {cost}\n"
        f"- ended: {manifest['ended'] or 'after its last step'}\n"
        f"- kept: {best.name}, by the greedy acceptance length of its own held-out conversations",
    ]
    if best == start:
        parts.append("**The head stays as it was: no checkpoint that may be kept accepts more of its own texts.**")
    elif is_longer(best, start, depth, heldout[0]):
        parts.append("**It accepts more of its own texts, beyond chance.** The checkpoint was chosen by these texts.")
    else:
        parts.append("**What it gained on its own texts may be chance.** More held-out conversations would tell.")
    for number, (store, ids) in enumerate(zip(stores, heldout, strict=True)):
        parts.append(f"## {'Its own texts' if not number else 'What it could before'}: {store.folder}")
        parts += [*tables(checkpoints, ids)] or ["Nothing is held out."]
        parts += by_group(checkpoints, _by_source(ids), depth)
    return parts


def _by_source(ids: set[str]) -> dict[str, set[str]]:
    """Return ids by the source of their prompts."""
    sources: dict[str, set[str]] = {}
    for name in sorted(ids):
        sources.setdefault(name.rpartition("/")[0], set()).add(name)
    return sources
