"""What the serving tests share: processes of vLLM's environment, and the requests made of an evaluated run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from builders import Run
from fledge.conf.runtime.journal import read_journal
from fledge.data_synthesis.tokens.chat_template import prompt_tokens
from servers import free_port, model_server

COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")


@contextlib.contextmanager
def vllm_server(
    folder: Path, verifier: Path, *options: str, head: Path | None = None, speculation: dict[str, Any] | None = None
) -> Iterator[str]:
    """Run vLLM's server on the CPU in float32; give its endpoint.

    It speculates with a draft head of 3 tokens if there is one, or as its own configuration says.
    """
    port = free_port()
    command = [os.environ["FLEDGE_VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", *options]
    command += ["--model", str(verifier), "--dtype", "float32", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if head is not None:
        speculation = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    if speculation:
        command += ["--speculative-config", json.dumps(speculation)]
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with model_server(command, port, folder / "server.log", environment) as endpoint:
        yield endpoint


def in_vllms_environment(script: str, argument: Path) -> tuple[dict[str, Any] | None, str]:
    """Run a script beside this file with vLLM's Python; give its answer, None if it has none, and all that it wrote."""
    command = [os.environ["FLEDGE_VLLM_PYTHON"], str(Path(__file__).with_name(script)), str(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answers = [line.removeprefix("ANSWER ") for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    return (json.loads(answers[-1]) if answers else None), done.stdout + done.stderr


def decode_in_vllm(folder: Path, request: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """Decode a request in vLLM: its counts and texts, None if it refused, and its log."""
    path = folder / "request.json"
    path.write_text(json.dumps(request))
    return in_vllms_environment("vllm_counts.py", path)


def evaluated(run: Run) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Give a run's acceptance.json, the request (but for the head) that asks vLLM the same, and the expected texts."""
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.verifier)
    prompts, texts = [], []
    for record in read_journal(run.path / "evaluation" / "questions.jsonl"):
        if record["category"] == "heldout":
            continue
        history: list[dict[str, str]] = []
        for turn, answer in zip(record["turns"], record["answers"], strict=True):
            history.append({"role": "user", "content": turn})
            prompts.append(prompt_tokens(tokenizer, history))
            texts.append(answer["text"])
            history.append({"role": "assistant", "content": answer["text"]})
    request = {
        "verifier": str(run.verifier),
        "num_draft_tokens": results["num_draft_tokens_per_round"],
        "max_tokens": results["max_tokens"],
        "prompts": prompts,
    }
    return results, request, texts
