"""The evaluate stage: acceptance length by decoding, per category, beside an untrained head and prompt lookup."""

from __future__ import annotations

from ..conf.artifact import artifact, file_digest, read_manifest, write_json
from ..conf.schema import Config
from ..models.formats import WEIGHTS, head_folder, load_head
from ..models.verifier import check_identity
from .answers import answer_questions
from .questions import Question, load_heldout, load_questions, questions_identity
from .report import print_table, write_report
from .results import ACCEPTANCE, summarise
from .tracking import track


def evaluate(config: Config) -> None:
    """Decode the questions speculatively and write runs/<name>/evaluation/."""
    options = config.evaluate
    source = head_folder(options.checkpoint, config.training_folder)
    head, record = load_head(source)
    check_identity(record["verifier"], config.verifier, str(source), "set the verifier it was trained for")
    questions = load_questions(options) + _heldout(config)
    settings = {
        "verifier": record["verifier"],
        "verifier_dtype": config.verifier.dtype.value,
        "head": file_digest(source / WEIGHTS),
        "questions": questions_identity(questions),
        "num_draft_tokens": options.num_draft_tokens,
        "max_tokens": options.max_tokens,
        "batch_size": options.batch_size,
        "baselines": options.baselines,
        "tree": [options.tree_depth, options.tree_top_k] if options.tree_depth else None,
        "temperature": options.temperature,
        **(
            {name: getattr(options, name) for name in ("seed", "top_p", "top_k")}
            | {"draft_sampling": options.draft_sampling.value}
            if options.temperature
            else {}
        ),
    }
    with artifact(config.run_folder / "evaluation", "evaluation", settings, config.overwrite) as target:
        if not (target.complete and (target.folder / ACCEPTANCE).is_file()):
            answer_questions(config, head, questions, target.folder)
            results = summarise(config, source, record, questions, target.folder)
            write_json(target.folder / ACCEPTANCE, results)
            track(config, source, settings, target.folder, results)
            target.finish()
        results = write_report(target.folder, config.training_folder)
        print_table(results)
        print(f"evaluation: {target.folder / ACCEPTANCE}, {target.folder / 'report.md'}")


def _heldout(config: Config) -> list[Question]:
    """Give held-out conversations of the run; none where the run has no conversations of its own (a foreign head)."""
    folder = config.conversations_folder
    if not config.evaluate.heldout_prompts or not (folder / "manifest.json").exists():
        return []
    return load_heldout(folder, read_manifest(folder, "conversations")["settings"], config.evaluate.heldout_prompts)
