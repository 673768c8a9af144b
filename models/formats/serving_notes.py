"""How to serve an export: SERVING.md and what engines read beside it."""

from .serving_formats import SERVING_FORMATS, ExportedHead


def engines_of(exported: ExportedHead) -> set[str]:
    """Return the engines that read an export's format."""
    return {engine.name for engine in SERVING_FORMATS[exported.format].engines}


def unserved(exported: ExportedHead) -> dict[str, str]:
    """Return the engines that read an export's format and cannot serve the head as it was trained, and why."""
    obstacles = {engine.name: engine.obstacles(exported) for engine in SERVING_FORMATS[exported.format].engines}
    return {engine: " and ".join(found) for engine, found in obstacles.items() if found}


def in_longer_contexts(longest_sample: int, has_window: bool) -> str:
    """Say what may happen beyond the tokens of the longest text that a head was trained on, and what helps."""
    return (
        f"The longest text that the head was trained on has {longest_sample:,} tokens. In longer contexts it may "
        "accept less: `fledge evaluate evaluate.context_lengths=[...]` measures how much."
        + ("" if has_window else " A window may help: `fledge export export.sliding_window=256`.")
    )


def serving_files(exported: ExportedHead) -> dict[str, str]:
    """Return SERVING.md, with a command for each engine that reads the format, and the files that they need."""
    engines, refused = SERVING_FORMATS[exported.format].engines, unserved(exported)
    parts = [
        f"# Serving this head\n\nThe verifier is `{exported.verifier}`{exported.at_revision}.",
        *(
            f"## {engine.name}\n\n{engine.name} cannot serve this head: {refused[engine.name]}."
            if engine.name in refused
            else engine.section(exported)
            for engine in engines
        ),
    ]
    if exported.head.fc_norm or exported.head.norm_output:
        parts.append(
            "The head is of the EAGLE-3.1 form (`fc_norm`, `norm_output`): releases that do not know these two fields "
            "either refuse it or accept fewer tokens than they should."
        )
    if not exported.lm_head:
        parts.append("The head has no `lm_head` of its own: every engine takes the verifier's, which is the same.")
    if exported.longest_sample:
        parts.append(in_longer_contexts(exported.longest_sample, bool(exported.head.sliding_window)))
    files = [engine.files(exported) for engine in engines if engine.name not in refused]
    return {"SERVING.md": "\n\n".join(parts) + "\n", **{name: text for some in files for name, text in some.items()}}
