"""vLLM as the judge: it must count what `fledge evaluate` counts. Run by `make test-serving`."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION, Run, copy_folder, copy_parts
from fledge.models.embedded.verifier import conversations, questions
from fledge.models.formats.fields import LAYER, vllm_layer_ids, written_fields
from fledge.models.formats.plain import CONFIG, load_head
from make_embedded import TINY, make_document, train
from serving import COUNTS, decode_in_vllm, evaluated, in_vllms_environment

pytestmark = pytest.mark.serving
WINDOW, BEFORE_FC = "draft.sliding_window=16", "draft.norm_before_fc=true"
LONGER = "train.max_steps=100"  # until weights that begin as zeros and ones count
FOUR = ["draft.aux_layers=[1,2,4,7]", "overwrite=true"]  # which the copied states are not of
HEADS = {
    "EAGLE-3.1": [],
    "EAGLE-3": ["draft=eagle3"],
    "norm before residual": ["draft=eagle3", "draft.norm_before_residual=true"],
    "full vocabulary": ["draft.vocab_size=null"],
    "the verifier's lm_head": ["draft.vocab_size=null", "draft.train_lm_head=false"],
    "another width": ["draft.hidden_size=96", "draft.num_attention_heads=4", "draft.num_key_value_heads=2"],
    "norm before fc": ["draft=eagle3", BEFORE_FC],
    "norm before fc and norms of aux states": [BEFORE_FC, LONGER],
    "window": [WINDOW],
    "4 aux layers": FOUR,
    "biases": ["draft.attention_bias=true", LONGER],
    "q and k norms": ["draft.qk_norm=true", LONGER],
    "2 layers": ["draft.num_layers=2"],
    "3 layers": ["draft.num_layers=3"],
    "5 layers": ["draft.num_layers=5"],
    "Speculators' default": [
        *("draft=eagle3", BEFORE_FC, "draft.norm_output=true", "draft.norm_before_residual=true"),
        *(WINDOW, "draft.train_lm_head=false"),
    ],
    "norm before fc, window": ["draft=eagle3", BEFORE_FC, WINDOW],
    "3 layers, window, 150 tokens": ["draft.num_layers=3", WINDOW, "draft.vocab_size=150"],
    "2 layers, window in one": ["draft.num_layers=2", WINDOW, "draft.window_layers=[1]"],
    "2 layers, q and k norms, window, 4 aux layers": ["draft.num_layers=2", "draft.qk_norm=true", WINDOW, *FOUR],
}
ENGINE = {"2 layers, window in one": {"disable_hybrid_kv_cache_manager": True}}  # as SERVING.md says
SIZES = {
    **SMALL_DECODER,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
LLAMA4 = {**SMALL_LLAMA4, "attention_chunk_size": 512}
VERIFIERS = {  # the class, and the sizes of its text decoder
    "Qwen3ForCausalLM": {"intermediate_size": 128},
    "Gemma3ForCausalLM": {"intermediate_size": 128, "sliding_window": 16, "tie_word_embeddings": True},
    "Llama4ForCausalLM": LLAMA4,
    "Llama4ForConditionalGeneration": LLAMA4,
}

SERVED_BY = {  # the class that vLLM runs, if it is another, and its options
    "Llama4ForConditionalGeneration": ("Llama4ForConditionalGeneration", {"limit_mm_per_prompt": {"image": 0}}),
    "Gemma3ForCausalLM": ("TransformersForCausalLM", {"model_impl": "transformers"}),  # as SERVING.md says
}


def judge(run: Run, folder: Path, architecture: str = "LlamaForCausalLM", **engine: object) -> None:
    """Export an evaluated head in both formats and hold vLLM's counts against the evaluation's.

    Args:
        architecture: the verifier's class, which must be the one that vLLM runs.
        engine: options of vLLM that the verifier needs.
    """
    run("export", "export.dtype=float32", "export.format=all")
    results, request, texts = evaluated(run)
    assert results["acceptance_length"] > 1.1, "a head that accepts nothing shows nothing"
    for format_ in ("plain", "speculators"):
        head = run.path / "exports" / format_
        counted, log = decode_in_vllm(folder, {**request, "head": str(head), "engine": engine})
        assert counted is not None, log[-6000:]
        lengths = sorted(map(len, request["prompts"]))
        print(format_, len(lengths), "prompts", lengths[0], "to", lengths[-1], [counted[name] for name in COUNTS])
        assert {name: counted[name] for name in COUNTS} == {name: results[name] for name in COUNTS}, format_
        assert counted["texts"] == texts
        assert counted["architecture"] == architecture
    head = load_head(run.path / "exports" / "plain")[0].config
    if not head.own_embedding and not (head.norm_before_fc and head.fc_norm):  # which its model has not
        check_read_by_speculators(run)


def check_read_by_speculators(run: Run) -> None:
    """Load the export with the speculators library: every tensor in its place, and every field as it was meant."""
    answer, log = in_vllms_environment("speculators_load.py", run.path / "exports" / "speculators")
    assert answer is not None, log[-6000:]
    head, _ = load_head(run.path / "exports" / "plain")
    config = head.config
    reduced = config.draft_vocab_size < config.vocab_size
    assert answer["class"] == "Eagle3DraftModel"
    assert answer["num_tensors"] == len(list(head.parameters())) + 2 * reduced  # and the two maps
    assert [answer[name] for name in ("missing", "unexpected", "unequal", "not_finite")] == [[], [], [], []]
    assert answer["fields"] == {
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        "embed_requires_grad": False,
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": None,
        "eagle_aux_hidden_state_layer_ids": vllm_layer_ids(config.aux_layers),
    }
    layer = written_fields(config, LAYER)
    common = answer["layer"].keys() & layer.keys()  # fields of a window stand in the files of heads with one
    assert {name: answer["layer"][name] for name in common} == {name: layer[name] for name in common}
    assert answer["verifier"]["name_or_path"] == str(run.verifier)
    assert answer["num_draft_tokens"] == 3
    print("speculators library: all", answer["num_tensors"], "tensors and", len(answer["fields"]), "fields as meant")


def write_long_questions(path: Path) -> None:
    """Write questions of many times a window's tokens: six of the embedded ones at a time."""
    turns = [question["turns"] for question in questions()]
    rows = [{"turns": [" ".join(asked) for asked in zip(*turns[k : k + 6], strict=True)]} for k in range(0, 48, 6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("head", HEADS)
def test_vllm_counts_what_fledge_counts(finished, run, tmp_path, head):
    copy_parts(finished, run)
    run.options = HEADS[head]
    if WINDOW in run.options:
        write_long_questions(tmp_path / "long.jsonl")
        more = [LONGER, "evaluate.questions_per_category=null"]
        run.options = [*run.options, *more, f"evaluate.questions={tmp_path / 'long.jsonl'}"]
    for stage in ("dump", "train", "evaluate"):
        run(stage, "evaluate.baselines=false")
    judge(run, tmp_path, **ENGINE.get(head, {}))


def test_vllm_counts_what_fledge_counts_with_a_head_that_rotates_half_of_each_head_dimension(finished, run, tmp_path):
    """No option trains one from nothing: a published one is imported and trained on."""
    published = tmp_path / "published"
    copy_folder(finished.path / "exports" / "plain", published)
    values = json.loads((published / CONFIG).read_text())
    values["rope_parameters"]["partial_rotary_factor"] = 0.5
    (published / CONFIG).write_text(json.dumps(values))
    copy_parts(finished, run)
    run("import", f"head_import.source={published}")
    run.options = [f"train.init_from={run.path / 'imports' / 'published'}"]
    for stage in ("train", "evaluate"):
        run(stage, "evaluate.baselines=false")
    judge(run, tmp_path)
    written = json.loads((run.path / "exports" / "plain" / CONFIG).read_text())
    assert written["rope_parameters"] == values["rope_parameters"]


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
    documents = [make_document(tokenizer, messages, TINY) for messages in conversations()[: TINY.num_conversations]]
    train(getattr(model, "language_model", model), documents, TINY)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("architecture", VERIFIERS)
def test_vllm_counts_what_fledge_counts_on_other_verifiers(tmp_path, verifier, architecture):
    make_verifier(architecture, verifier.tokenizer, tmp_path / "verifier")
    run = Run(tmp_path / "runs", tmp_path / "verifier")
    for stage in ("synthesize", "dump", "train", "evaluate"):
        run(stage, "evaluate.baselines=false")
    ran, options = SERVED_BY.get(architecture, (architecture, {}))
    judge(run, tmp_path, ran, **options)
