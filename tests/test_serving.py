"""vLLM as the judge: it must count what `fledge evaluate` counts. Run by `make test-serving`."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from fledge.conf.journal import read_journal
from fledge.data_synthesis.chat import prompt_tokens

pytestmark = pytest.mark.serving
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")


def vllm_counts(folder: Path, request: dict) -> dict:
    """Decode in a process of vLLM's environment and give its counts and texts."""
    (folder / "request.json").write_text(json.dumps(request))
    script = Path(__file__).with_name("vllm_counts.py")
    python = os.environ["FLEDGE_VLLM_PYTHON"]
    done = subprocess.run(
        [python, str(script), str(folder / "request.json")], capture_output=True, text=True, check=False
    )
    answers = [line for line in done.stdout.splitlines() if line.startswith("COUNTS ")]
    assert answers, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(answers[-1].removeprefix("COUNTS "))


@pytest.mark.parametrize("format_", ["plain", "speculators"])
def test_vllm_counts_what_fledge_counts(finished, verifier, tmp_path, format_):
    finished("export", "export.dtype=float32", f"export.format={format_}")
    results = json.loads((finished.path / "evaluation" / "acceptance.json").read_text())
    assert results["acceptance_length"] > 1.2, "a head that accepts nothing shows nothing"
    prompts, texts = [], []
    for record in read_journal(finished.path / "evaluation" / "questions.jsonl"):
        if record["category"] == "heldout":
            continue
        history: list[dict[str, str]] = []
        for turn, answer in zip(record["turns"], record["answers"], strict=True):
            history.append({"role": "user", "content": turn})
            prompts.append(prompt_tokens(verifier.tokenizer, history))
            texts.append(answer["text"])
            history.append({"role": "assistant", "content": answer["text"]})
    counted = vllm_counts(
        tmp_path,
        {
            "verifier": str(finished.verifier),
            "head": str(finished.path / "exports" / format_),
            "num_draft_tokens": results["num_draft_tokens_per_round"],
            "max_tokens": results["max_tokens"],
            "prompts": prompts,
        },
    )
    assert {name: counted[name] for name in COUNTS} == {name: results[name] for name in COUNTS}
    assert counted["texts"] == texts
