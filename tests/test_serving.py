"""vLLM as the judge: it must count what `fledge evaluate` counts. Run by `make test-serving`."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION, Run
from conftest import TINY
from fledge.conf.journal import read_journal
from fledge.data_synthesis.chat import prompt_tokens
from fledge.models.embedded import corpus
from fledge.models.embedded import verifier as embedded

pytestmark = pytest.mark.serving
COUNTS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens", "num_accepted_tokens_per_pos")
HEADS = {
    "EAGLE-3.1": [],
    "EAGLE-3": ["draft=eagle3"],
    "norm before residual": ["draft=eagle3", "draft.norm_before_residual=true"],
    "full vocabulary": ["draft.vocab_size=null"],
}
SIZES = {
    **SMALL_DECODER,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LLAMA4 = {**SMALL_LLAMA4, "attention_chunk_size": 512}
VERIFIERS = {  # the class, and the sizes of its text decoder
    "Qwen3ForCausalLM": {"intermediate_size": 128},
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4,
}


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


def judge(run: Run, folder: Path, architecture: str = "LlamaForCausalLM", **engine: object) -> None:
    """Export an evaluated head in both formats and hold vLLM's counts against the evaluation's.

    Args:
        architecture: the verifier's class, which must be the one that vLLM runs.
        engine: options of vLLM that the verifier needs.
    """
    run("export", "export.dtype=float32", "export.format=all")
    results = json.loads((run.path / "evaluation" / "acceptance.json").read_text())
    assert results["acceptance_length"] > 1.1, "a head that accepts nothing shows nothing"
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
    for format_ in ("plain", "speculators"):
        request = {
            "verifier": str(run.verifier),
            "head": str(run.path / "exports" / format_),
            "num_draft_tokens": results["num_draft_tokens_per_round"],
            "max_tokens": results["max_tokens"],
            "prompts": prompts,
            "engine": engine,
        }
        counted = vllm_counts(folder, request)
        print(format_, {name: counted[name] for name in COUNTS})
        assert {name: counted[name] for name in COUNTS} == {name: results[name] for name in COUNTS}, format_
        assert counted["texts"] == texts
        assert counted["architecture"] == architecture


@pytest.mark.parametrize("head", HEADS)
def test_vllm_counts_what_fledge_counts(finished, run, tmp_path, head):
    for name in ("conversations", "hidden_states"):
        shutil.copytree(finished.path / name, run.path / name)
    for stage in ("dump", "train", "evaluate"):
        run(stage, *HEADS[head], "evaluate.baselines=false")
    run.options = HEADS[head]
    judge(run, tmp_path)


def make_verifier(architecture: str, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> None:
    """Train a small model of the class as the tiny Llama is trained; of one that takes images, the text decoder."""
    sizes = {**SIZES, **VERIFIERS[architecture], "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model_class = getattr(transformers, architecture)
    if model_class.config_class is transformers.Llama4Config:
        config = transformers.Llama4Config(text_config={**sizes, **ids}, vision_config=SMALL_VISION)
    else:
        config = model_class.config_class(**sizes, **ids)
    torch.manual_seed(0)
    model = model_class(config)
    conversations = corpus.training_conversations(TINY.num_conversations, TINY.seed)
    documents = [embedded._document(tokenizer, messages, TINY) for messages in conversations]
    embedded._train(getattr(model, "language_model", model), documents, TINY)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", VERIFIERS)
def test_vllm_counts_what_fledge_counts_on_other_verifiers(tmp_path, verifier, architecture):
    make_verifier(architecture, verifier.tokenizer, tmp_path / "verifier")
    run = Run(tmp_path / "runs", tmp_path / "verifier")
    for stage in ("synthesize", "dump", "train", "evaluate"):
        run(stage, "evaluate.baselines=false")
    takes_images = architecture.endswith("ForConditionalGeneration")
    judge(run, tmp_path, architecture, **({"limit_mm_per_prompt": {"image": 0}} if takes_images else {}))
