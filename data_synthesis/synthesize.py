"""The synthesize stage: the verifier answers every user turn, in order, on its own history."""

import sys
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import Artifact, artifact, read_manifest
from ..conf.runtime.progress import Progress
from ..conf.runtime.signals import EXIT_AGAIN
from ..conf.schema import OF_SELF, SELF, Config
from ..models.verifier.weights import verifier_identity
from .answers.answer_log import FILE as FAILURES
from .answers.answer_log import AnswerLog, summarise
from .answers.local import answer_here
from .answers.logged import take_logged
from .answers.remote import answer_by_servers
from .answers.self_prompts import write_self_prompts
from .conversations import add_digests, content_digest, part_folder
from .prompts.prepare import PreparedPrompts, prepare_prompts
from .prompts.sources import source_name
from .states.verifier_check import check_verifier


def synthesize(config: Config) -> None:
    """Answer the prompts of `data` with the verifier and write runs/<name>/conversations/."""
    check_verifier(config.verifier, config.draft, for_states=False)
    write_self_prompts(config)
    prompts = prepare_prompts(config)
    settings = _settings(config, prompts)
    folder, shard, num_shards = config.conversations_folder, config.synthesize.shard, config.synthesize.num_shards
    if num_shards == 1:
        _answer(config, prompts, folder, settings)
        return
    whole = {**settings, "num_shards": num_shards}
    with artifact(folder, "conversations", whole, config.overwrite, wait=True):
        pass  # the folder is this run's now, and so are the parts in it
    _answer(config, prompts, part_folder(folder, shard, num_shards), {**settings, "shard": [shard, num_shards]})
    with artifact(folder, "conversations", whole, wait=True) as target:
        _join_parts(target, num_shards, config.verifier.origin)


def _settings(config: Config, prompts: PreparedPrompts) -> dict[str, Any]:
    options = config.synthesize
    written = [source for source in config.data.sources if source.path == SELF and source.turns > 1]
    further = {source_name(source): {name: getattr(source, name) for name in OF_SELF} for source in written}
    excluded = read_manifest(prompts.folder, "prompts")["settings"]["exclude"]
    if further and excluded:
        further["exclude"] = excluded
    here = {"seed": options.seed, "verifier_dtype": config.verifier.dtype.value}
    return {
        "verifier": verifier_identity(config.verifier),
        "prompts": prompts.digest,
        "heldout_share": config.data.heldout_share,
        "synthesize": {
            "max_tokens": options.max_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
            **({"request": options.request} if options.by_servers else here),
            **({"self_turns": further} if further else {}),
        },
    }


def _answer(config: Config, prompts: PreparedPrompts, folder: Path, settings: dict[str, Any]) -> None:
    """Answer one shard of the prompts; exits with a code that asks for another start if something is left."""
    options = config.synthesize
    with artifact(folder, "conversations", settings, config.overwrite) as target:
        has_failures = (folder / FAILURES).is_file()  # deleted, all that failed are tried anew
        if target.complete and has_failures and target.manifest["content"] == content_digest(folder):
            print(f"conversations: {folder} is complete")
            return
        target.save(complete=False, **config.verifier.origin, prompts=prompts.counts)
        log = AnswerLog(folder, options.max_attempts)
        num_prompts = len(range(options.shard, prompts.count, options.num_shards))
        log.progress = Progress("synthesize", num_prompts, "conversation", done=log.num_done)
        answer = answer_by_servers if options.by_servers else answer_here
        with closing(log):
            answer(config, take_logged(config, prompts.read(options.shard, options.num_shards), log), log)
        _finish(target, log, num_prompts)


def _finish(target: Artifact, log: AnswerLog, num_prompts: int) -> None:
    made, sources = summarise(target.folder)
    reasons = dict(Counter(failure.reason for failure in log.failures.values()).most_common())
    counts = {"prompts": num_prompts, **made, "failed": len(log.failures), "failed_because": reasons}
    assert made["conversations"] + len(log.failures) == num_prompts
    if reasons:
        why = ", ".join(f"{reason} ({number})" for reason, number in reasons.items())
        print(f"synthesize: {len(log.failures)} of {num_prompts} conversations could not be made: {why}")
    if again := log.to_try_again:
        target.save(counts=counts)
        print(
            f"fledge: {len(again)} of them are tried again by the same command, up to synthesize.max_attempts starts "
            f"in all; the last: {again[-1].reason}: {again[-1].detail}",
            file=sys.stderr,
        )
        sys.exit(EXIT_AGAIN)
    if num_prompts and not made["conversations"]:
        raise ValueError(f"no conversation could be made: {', '.join(reasons)}")
    target.finish(counts=counts, sources=sources, content=content_digest(target.folder))
    print(f"conversations: {made['conversations']} in {target.folder}")


def _join_parts(target: Artifact, num_shards: int, origin: dict[str, str | None]) -> None:
    """Complete the whole when every part is."""
    parts = []
    for shard in range(num_shards):
        with suppress(ValueError):  # not made yet, or not to its end
            parts.append(read_manifest(part_folder(target.folder, shard, num_shards), "conversations"))
    if len(parts) < num_shards:
        print(f"conversations: {len(parts)} of {num_shards} shards are complete")
        return
    content = add_digests(part["content"] for part in parts)
    if target.complete and target.manifest["content"] == content:
        return
    target.save(complete=False, **origin, prompts=parts[0]["prompts"])
    counts, sources, reasons = Counter[str](), Counter[str](), Counter[str]()
    for part in parts:
        reasons.update(part["counts"].pop("failed_because"))
        counts.update(part["counts"])
        sources.update(part["sources"])
    target.finish(counts={**counts, "failed_because": reasons}, sources=sources, content=content)
    print(f"conversations: all {num_shards} shards are complete, {counts['conversations']} in {target.folder}")
