"""The evaluate stage: acceptance length by decoding, per category, beside an untrained head and prompt lookup."""

from pathlib import Path
from typing import Any

from ..conf.runtime.artifact import artifact, differences, find_artifact, read_manifest, write_json
from ..conf.schema import Config, EvaluateEngine
from ..models.formats.plain import head_digest, load_head
from ..models.formats.training_folder import head_folder
from ..models.head.draft_head import DraftHead
from ..models.kernels.self_check import require_gpu
from ..models.verifier.config import torch_device
from ..models.verifier.weights import check_identity, verifier_outline
from .figures.history import add_to_history
from .figures.records import ACCEPTANCE
from .figures.report import REPORT_HTML, print_table, write_report
from .figures.results import summarise
from .figures.wandb_summary import track
from .local import answer_questions
from .questions.question import Question, load_heldout, load_questions, questions_identity
from .questions.reader import QuestionReader, at_context_lengths
from .served.client import answer_by_server, check_server


def evaluate(config: Config) -> dict[str, Any]:
    """Decode the questions speculatively and write runs/<name>/evaluation/; return what acceptance.json holds."""
    if config.verifier.tensor_parallel:
        raise ValueError(
            "verifier.tensor_parallel must be false in evaluate, which is one process: verifier.device=auto spreads a "
            "verifier over several GPUs, evaluate.engine=server measures in an engine"
        )
    by_server = config.evaluate.engine is EvaluateEngine.server
    if config.evaluate.lacks_server:
        raise ValueError(
            "evaluate.endpoint is required with evaluate.engine=server: the base URL of a vLLM or SGLang that serves "
            "the verifier with the head, such as http://localhost:8000/v1"
        )
    if not by_server:
        require_gpu("evaluate.kernels", config.evaluate.kernels, torch_device(config.verifier.device))
    source, head, verifier = _head(config, by_server)
    asked = load_questions(config.evaluate, config.data.local_images)
    questions = at_context_lengths(config, asked) + _heldout(config)
    settings = _settings(config, source, verifier, questions)
    folder = config.run_folder / "evaluation"
    begun, reader = find_artifact(folder, settings), None
    if by_server and begun is None:
        check_server(config, questions)
    elif not by_server and not (begun and begun.complete):
        reader = QuestionReader(config)
        reader.check(questions)
    with artifact(folder, "evaluation", settings, config.overwrite) as target:
        if not (target.complete and (target.folder / ACCEPTANCE).is_file()):
            if head is None:
                answer_by_server(config, questions, target)
            else:
                answer_questions(config, head, questions, target, reader)
            results = summarise(config, source, verifier, questions, target.folder, target.manifest.get("served"))
            write_json(target.folder / ACCEPTANCE, results)
            track(config, source, settings, target.folder, results)
            target.finish()
        results = write_report(target.folder, config.training_folder, source)
        print_table(results)
        if config.evaluate.history:
            print(add_to_history(Path(config.evaluate.history), config.name, results))
        print(f"evaluation: {target.folder / ACCEPTANCE}, {target.folder / 'report.md'}, {target.folder / REPORT_HTML}")
    return results


def _head(config: Config, by_server: bool) -> tuple[Path | None, DraftHead | None, dict[str, Any]]:
    """Return the head's folder, None if only a server knows it; the head to decode with here; and its verifier."""
    outline = verifier_outline(config.verifier) if by_server else {}
    if by_server and config.evaluate.checkpoint is None:
        return None, None, outline
    source = head_folder(config.evaluate.checkpoint, config.training_folder)
    head, record = load_head(source)
    recorded = record["verifier"]
    if not by_server:
        check_identity(recorded, config.verifier, str(source), "set the verifier it was trained for")
        return source, head, recorded
    changes = differences({name: recorded.get(name) for name in outline}, outline)
    if changes:
        raise ValueError(
            f"evaluate.checkpoint: {source} was trained for another verifier than verifier.path="
            f"{config.verifier.path} ({'; '.join(changes)}): set the verifier it was trained for"
        )
    return source, None, outline


def _settings(
    config: Config, source: Path | None, verifier: dict[str, Any], questions: list[Question]
) -> dict[str, Any]:
    """Return what determines the answers and counts."""
    options = config.evaluate
    by_server = options.engine is EvaluateEngine.server
    engine: dict[str, Any]
    if by_server:
        engine = {"engine": options.engine.value, "model": config.synthesize.model or config.verifier.path}
    else:
        engine = {"verifier_dtype": config.verifier.dtype.value, "baselines": options.baselines}
    return {
        "verifier": verifier,
        **engine,
        "head": head_digest(source) if source else None,
        "questions": questions_identity(questions),
        **{name: getattr(options, name) for name in ("num_draft_tokens", "max_tokens", "batch_size")},
        "tree": [options.tree_depth, options.tree_top_k] if options.tree_depth else None,
        "temperature": options.temperature,
        **({name: getattr(options, name) for name in ("seed", "top_p", "top_k")} if options.temperature else {}),
        **({"draft_sampling": options.draft_sampling.value} if options.temperature and not by_server else {}),
    }


def _heldout(config: Config) -> list[Question]:
    """Return held-out conversations of the run; none if it has no conversations of its own (a foreign head)."""
    folder = config.conversations_folder
    if not config.evaluate.heldout_prompts or not (folder / "manifest.json").exists():
        return []
    return load_heldout(folder, read_manifest(folder, "conversations")["settings"], config.evaluate.heldout_prompts)
