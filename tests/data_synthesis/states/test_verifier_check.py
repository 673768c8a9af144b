"""Before the first stage: a head is derived from any verifier, its matrices are found, or one sentence says why not."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from builders import SMALL_DECODER, composed
from commands import run_command
from fledge.conf.schema import Config, Device, DraftConfig, Dtype, VerifierConfig
from fledge.data_synthesis.states.verifier_check import check_verifier
from fledge.models.head.config import DraftHeadConfig, describe_sizes
from fledge.models.head.draft_head import DraftHead
from fledge.models.verifier import model as verifier_module
from fledge.models.verifier.config import load_whole_config
from fledge.models.verifier.model import Verifier, load_final_norm
from fledge.models.verifier.processor import load_processor
from fledge.models.verifier.weights import VerifierWeights
from fledge.slurm.plan.plan import plan
from fledge.slurm.submit import submit
from make_embedded import CHAT_TEMPLATE
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

SMALL = {**SMALL_DECODER, "vocab_size": 128, "max_position_embeddings": 256, "intermediate_size": 128}
SMALL |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "tie_word_embeddings": False}
MAMBA = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1, "chunk_size": 16}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def configuration(family, **changes):
    kind = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    return kind(**{name: value for name, value in {**SMALL, **changes}.items() if value is not ...})


def save_tokenizer(folder, template=CHAT_TEMPLATE, size=120):
    words = Tokenizer(WordLevel({f"w{i:03}": i for i in range(size)}, unk_token="w000"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w001", chat_template=template)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save(folder, family, **changes):
    """Write a random verifier of a family, and give its model."""
    torch.manual_seed(0)
    config = configuration(family, **changes)
    name = f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
    model = getattr(transformers, name)(config)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def options(folder, *more) -> Config:
    own = (f"runs_dir={folder.parent / 'runs'}", "verifier.dtype=float32", "verifier.device=cpu", "draft.vocab_size=64")
    return composed("name=x", f"verifier.path={folder}", "data=embedded", *own, *more)


def checked(config) -> DraftHeadConfig:
    return check_verifier(config.verifier, config.draft)


def derived(config, **draft) -> DraftHeadConfig:
    return DraftHeadConfig.from_verifier(DraftConfig(vocab_size=None, aux_layers=[0], **draft), config)


@pytest.mark.parametrize(
    ("family", "sizes", "heads", "keys"),
    [
        ("Qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2}, 2, 2),
        ("Glm4Moe", {"hidden_size": 5120, "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128}, 40, 8),
        ("Qwen3", {"hidden_size": 5120, "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256}, 20, 4),
        ("Qwen3", {"hidden_size": 96, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 18}, 4, 1),
        ("Qwen3", {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}, 32, 8),
    ],
)
def test_a_head_has_as_many_attention_heads_as_a_llama_can_have(family, sizes, heads, keys):
    head = derived(configuration(family, **sizes))
    assert (head.num_attention_heads, head.num_key_value_heads) == (heads, keys)
    assert head.head_dim == sizes.get("head_dim", 32)
    assert head.llama_config().num_attention_heads == heads  # transformers, so engines, take it
    with torch.device("meta"):
        DraftHead(head)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_attention_heads": 5}, r"draft\.num_attention_heads must divide the head's width of 64.*got 5"),
        ({"num_key_value_heads": 3}, r"draft\.num_attention_heads \(2\) must be a multiple of draft\.num_key_value"),
        ({"head_dim": 31}, r"draft\.head_dim must be even.*got 31"),
        (
            {"hidden_size": 48, "num_attention_heads": 32},
            r"draft\.num_attention_heads must divide the head's width of 48",
        ),
    ],
)
def test_sizes_given_by_hand_that_no_head_can_have_are_refused_by_the_options_name(given, said):
    with pytest.raises(ValueError, match=said):
        derived(configuration("Qwen3"), **given)


@pytest.mark.parametrize("layers", [[8], [-1, 2], []])
def test_aux_layers_that_the_verifier_does_not_have_are_refused_before_it_is_loaded(layers):
    with pytest.raises(ValueError, match=r"draft\.aux_layers must be layers of the verifier, 0 to 7"):
        DraftHeadConfig.from_verifier(DraftConfig(aux_layers=layers), configuration("Llama"))


MIXED = {"num_experts": 128, "num_experts_per_tok": 8}
WIDTHS = {  # of published verifiers
    "Llama 3.1 8B": ("Llama", {"hidden_size": 4096, "intermediate_size": 14336}, 14336),
    "Qwen3 30B, experts apart": ("Qwen3Moe", {**MIXED, "intermediate_size": 6144, "moe_intermediate_size": 768}, 6144),
    "Maverick": ("Llama4", {**EXPERTS, "intermediate_size": 8192, "intermediate_size_mlp": 16384}, 16384),
    "Qwen3.5 MoE": (
        "Qwen3_5Moe",
        {"intermediate_size": ..., "moe_intermediate_size": 512, "shared_expert_intermediate_size": 256, **MIXED},
        8 * 512 + 256,
    ),
    "MiniMax-M2": (
        "MiniMaxM2",
        {"hidden_size": 3072, "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8},
        8 * 1536,
    ),
    "gpt-oss": ("GptOss", {"hidden_size": 2880, "intermediate_size": 2880, "num_experts_per_tok": 4}, 4 * 2880),
    "Gemma 4 26B": (
        "Gemma4",
        {
            "hidden_size": 2816,
            "intermediate_size": 2112,
            "moe_intermediate_size": 704,
            "enable_moe_block": True,
            "num_experts": 128,
            "top_k_experts": 8,
        },
        8 * 704,
    ),
    "Mixtral": ("Mixtral", {**EXPERTS, "intermediate_size": 14336}, 2 * 14336),
    "OPT": ("OPT", {"intermediate_size": ..., "ffn_dim": 96}, 96),
    "Gemma 3n, by layer": ("Gemma3n", {"intermediate_size": [128] * 5 + [256] * 3, "num_kv_shared_layers": 0}, 128),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_heads_mlp_is_as_wide_as_what_a_token_meets_in_the_verifier(name):
    family, sizes, width = WIDTHS[name]
    config = configuration(family, **sizes)
    assert derived(config).intermediate_size == width
    assert f"MLP of {width} (" in describe_sizes(DraftConfig(), config)
    assert derived(config, intermediate_size=40).intermediate_size == 40


@pytest.mark.parametrize("family", ["GPT2", "Mpt", "Bloom"])
def test_a_width_that_nothing_tells_is_asked_for_by_its_option(family):
    config = getattr(transformers, f"{family}Config")()
    with pytest.raises(ValueError, match=r"draft\.intermediate_size is required: config\.json of .* does not say"):
        derived(config)


def test_a_size_that_differs_between_layers_is_the_commonest():
    gemma = configuration("Gemma4", hidden_size_per_layer_input=0, head_dim=32, global_head_dim=64)
    assert derived(gemma).head_dim == 32
    narrow = {layer: {"num_key_value_heads": 1, "intermediate_size": 96} for layer in (0, 3, 5)}
    llama = configuration("Llama", num_key_value_heads=2, per_layer_config=narrow)
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = llama.intermediate_size
    assert (derived(llama).num_key_value_heads, derived(llama).intermediate_size) == (2, 128)
    eps = configuration("Qwen3", per_layer_config={0: {"rms_norm_eps": 1e-3}})
    assert derived(eps).rms_norm_eps == pytest.approx(1e-6)


NAMED = {
    "nemotron h": ("NemotronH", {"layers_block_type": ["mamba", "attention", "mlp", "mamba"] * 2, **MAMBA}),
    "gpt neox": ("GPTNeoX", {"num_key_value_heads": ..., "head_dim": ...}),
    "gpt 2, tied": ("GPT2", {"tie_word_embeddings": True, "n_inner": 128}),
    "falcon": ("Falcon", {"ffn_hidden_size": 128, "alibi": False, "head_dim": ..., "num_key_value_heads": ...}),
    "opt": ("OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
}


@pytest.mark.parametrize("name", NAMED)
def test_matrices_by_any_name_are_found_through_the_model(tmp_path, name):
    model = save(tmp_path / "v", NAMED[name][0], **NAMED[name][1])
    config = options(tmp_path / "v", "draft.intermediate_size=128")
    weights = VerifierWeights(config.verifier)
    assert torch.equal(weights.embedding(), model.get_input_embeddings().weight)
    assert torch.equal(weights.lm_head(), model.get_output_embeddings().weight)
    assert checked(config).hidden_size == 64
    states = Verifier.load(config.verifier, [7]).forward(torch.arange(1, 20)[None], use_cache=False)
    assert torch.equal(load_final_norm(config.verifier)(states.aux_hidden_states), states.last_hidden_state)


def test_names_of_a_published_checkpoint_are_read_as_transformers_reads_them(tmp_path):
    model = save(tmp_path / "v", "NemotronH", **NAMED["nemotron h"][1])
    file = tmp_path / "v" / "model.safetensors"
    published = {name.replace("model.", "backbone."): tensor for name, tensor in load_file(file).items()}
    save_file(published, file, {"format": "pt"})
    weights = VerifierWeights(options(tmp_path / "v").verifier)
    assert torch.equal(weights.embedding(), model.get_input_embeddings().weight)


def without(name):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file({n: t for n, t in tensors.items() if name not in n}, folder / "model.safetensors", {"format": "pt"})

    return change


def narrower(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:100].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config_of(**changes):
    def change(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))

    return change


def beyond(folder):
    save_tokenizer(folder, "w139", 140)


def ends_beyond(folder):
    tokenizer = save_tokenizer(folder, size=140)
    tokenizer.eos_token = "w130"
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 130}))


BROKEN = {
    "no embedding": (without("embed_tokens"), r"no tensor \*\.embed_tokens\.weight, and none that transformers loads"),
    "no lm_head": (without("lm_head"), r"has no tensor \*\.lm_head\.weight"),
    "another vocabulary": (narrower, r"needs lm_head\.weight of vocab_size=128 rows .* it is \[100, 64\]"),
    "sizes of nonsense": (config_of(hidden_size="wide"), r"cannot be loaded by transformers"),
    "heads of nonsense": (config_of(num_attention_heads=3), r"cannot be loaded by transformers .* not a multiple of"),
    "unknown kind": (config_of(model_type="nosuch"), r"verifier\.path .*nosuch"),
    "template beyond": (beyond, r"tokenizer writes 'w139'"),
    "ends beyond": (ends_beyond, r"tokenizer writes 'w130'"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_verifier_that_no_head_can_be_trained_for_is_refused_in_a_sentence_before_anything(tmp_path, name):
    folder = tmp_path / "v"
    save(folder, "Llama")
    config = options(folder, "plan.conversations=10", "cluster=slurm_gpu", "submit.dry_run=true")
    checked(config)
    change, said = BROKEN[name]
    change(folder)
    for command in (checked, plan, submit):
        with pytest.raises(ValueError, match=said) as error:
            command(config)
        assert len(str(error.value)) < 700
    assert not (tmp_path / "runs").exists()


def test_synthesize_says_it_in_a_sentence_and_writes_nothing(tmp_path):
    save(tmp_path / "v", "Llama")
    common = ["name=x", f"runs_dir={tmp_path / 'runs'}", "data=embedded", f"verifier.path={tmp_path / 'v'}"]
    command = [sys.executable, "-m", "fledge", "synthesize", *common, "draft.num_attention_heads=3"]
    done = run_command(command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fledge: error: draft.num_attention_heads must divide")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").rglob("manifest.json"))


def test_the_embedded_verifier_is_refused_for_a_head_that_it_cannot_have(tmp_path):
    config = composed("experiment=demo", "name=x", f"runs_dir={tmp_path}", "draft.num_attention_heads=5")
    for command in (checked, plan, submit):
        with pytest.raises(ValueError, match=r"draft\.num_attention_heads must divide"):
            command(config)


def test_a_job_checks_the_verifier_that_is_not_at_hand_where_it_is_submitted(tmp_path, capsys):
    config = composed("name=x", "verifier.path=no/such", f"runs_dir={tmp_path}", "data=embedded", "cluster=slurm_gpu")
    config.submit.dry_run = True
    submit(config)
    said = capsys.readouterr()
    assert "the first job checks the verifier, which is not at hand here: verifier.path 'no/such'" in said.err
    assert "#SBATCH" in said.out


def of_code(part):
    """Let a checkpoint name code of its repository for a part that transformers does not have."""

    def change(folder):
        module = "import pathlib\npathlib.Path(__file__).with_name('run').touch()\n"
        (folder / "own.py").write_text(
            module + "from transformers import LlamaConfig as Own, PreTrainedTokenizerFast\n"
        )
        if part == "AutoTokenizer":
            path = folder / "tokenizer_config.json"
            own = {"tokenizer_class": "Own", "auto_map": {part: ["own.Own", None]}}
            path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
            (folder / "tokenizer.json").unlink()
        else:
            config_of(model_type="own_kind", auto_map={part: "own.Own"})(folder)

    return change


@pytest.mark.parametrize("part", ["AutoConfig", "AutoTokenizer"])
@pytest.mark.parametrize("command", ["synthesize", "plan"])
def test_code_of_the_verifiers_repository_is_neither_run_nor_asked_for(tmp_path, part, command):
    folder = tmp_path / "v"
    save(folder, "Llama")
    of_code(part)(folder)
    given = ["name=x", f"runs_dir={tmp_path / 'runs'}", "data=embedded", f"verifier.path={folder}"]
    done = subprocess.run(
        [sys.executable, "-m", "fledge", command, *given, "plan.conversations=10", "draft.vocab_size=64"],
        input="y\n" * 20,  # to whoever asks
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "[y/N]" not in said
    assert "trust_remote_code" not in said
    assert "fledge runs no such code: give a copy that transformers" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.rglob("run"))


def test_the_model_and_the_processor_are_loaded_without_code_of_the_repository_too(tmp_path):
    folder = tmp_path / "v"
    save(folder, "Llama")
    of_code("AutoModelForCausalLM")(folder)
    config_of(model_type="llama", auto_map={"AutoModelForCausalLM": "own.Own", "AutoProcessor": "own.Own"})(folder)
    assert checked(options(folder))  # transformers has this class itself
    assert Verifier.load(options(folder).verifier, [1])
    with pytest.raises(ValueError, match="fledge runs no such code"):
        load_processor(options(folder).verifier)
    assert not list(tmp_path.rglob("run"))


@pytest.mark.parametrize(
    ("free_gib", "changes", "one"),
    [
        (80, {}, True),  # 16 GB of weights
        (24, {}, True),
        (19, {}, False),  # it would hold the weights, and little else
        (38, {"dtype": Dtype.float32}, False),
        (80, {"dtype": Dtype.float32}, True),
        (80, {"device": Device.cuda}, True),
    ],
)
def test_a_verifier_that_one_gpu_holds_is_not_spread_over_several(tmp_path, monkeypatch, free_gib, changes, one):
    """What torch says of GPUs is made up; the placement is what transformers is given."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free_gib * 2**30, 80 * 2**30))
    whole = transformers.LlamaConfig(  # of 8.0 G parameters
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8
    )
    placed = verifier_module._placement(VerifierConfig("x", **changes), whole, None)
    assert placed["device_map"] == ({"": torch.device("cuda")} if one else "auto")


def test_a_quantised_verifier_counts_as_it_is_stored_when_it_is_placed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    save(tmp_path / "v", "Llama")
    config = options(tmp_path / "v").verifier
    config.device = Device.auto
    path = tmp_path / "v" / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    stored = path.stat().st_size  # half of what its float32 takes
    for scheme, free, one, capability in (
        ({}, 1.4, True, (9, 0)),
        ({}, 1.2, False, (9, 0)),
        ({"dequantize": True}, 2.4, False, (9, 0)),
        ({"dequantize": True}, 2.8, True, (9, 0)),
        ({}, 2.4, False, (8, 0)),  # without float8, so that transformers dequantises it
        ({"quant_method": "mxfp4"}, 2.4, False, (9, 0)),  # dequantised without a package that is not ours
    ):
        whole = load_whole_config(config)
        whole.quantization_config = {"quant_method": "fp8", "weight_block_size": [32, 32], **scheme}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, capability=capability: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (int(free * stored), 0))
        assert (verifier_module._placement(config, whole, None)["device_map"] != "auto") is one
