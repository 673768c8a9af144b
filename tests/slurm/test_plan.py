"""The plan: every recipe has one, nothing is loaded for it, and its figures are those of what it plans."""

import json
import shlex
import shutil
import types
from pathlib import Path

import fledge.conf
import pytest
from builders import composed, copy_parts
from fledge.conf.cli import main
from fledge.conf.runtime.artifact import read_manifest
from fledge.conf.schema import LastStates, StateDtype
from fledge.slurm.plan.plan import make_plan, plan
from fledge.slurm.plan.verifier_shape import verifier_shape
from transformers import AutoConfig

EXPERIMENTS = sorted(path.stem for path in (Path(fledge.conf.__file__).parent / "experiment").glob("*.yaml"))
RECIPES = [name for name in EXPERIMENTS if name != "demo"]

# Sizes as the hub and the makers round them, in 10^9 parameters: of all, and of those that a token meets.
PUBLISHED = {
    "llama31_8b": (8.03, 8.03),
    "llama31_405b_fp4": (406, 406),
    "llama4_maverick": (402, 17),
    "qwen3_8b": (8.2, 8.2),
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_is_valid(experiment):
    config = composed(f"experiment={experiment}", "name=x")
    assert config.verifier.path != "???"


@pytest.mark.parametrize("experiment", RECIPES)
def test_every_recipe_has_a_plan_without_the_hub(experiment, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = make_plan(composed(f"experiment={experiment}", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=100"))
    assert made["verifier"]["sizes from"] == "verifier.shapes"
    assert made["warnings"] == [] or experiment == "llama4_maverick"  # BF16 fills more than a node of H100s


def test_a_verifier_in_bf16_that_no_node_holds_is_warned_of_by_name(tmp_path):
    made = make_plan(composed("experiment=llama4_maverick", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=1"))
    first, second, third = made["warnings"]
    assert "the verifier's weights are 746.38 GiB, a node's GPUs have 632.00 GiB" in first
    assert (
        "transformers loads them, 746.38 GiB, and a node's GPUs have 632.00 GiB: set evaluate.engine=server" in second
    )
    assert "set dump.dtype=float8 and dump.last_states=counted, train.hidden_states=online" in third


def test_weights_that_transformers_dequantises_are_counted_as_it_loads_them(tmp_path):
    given = ["experiment=llama4_maverick_w4a16", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=100"]
    (said,) = make_plan(composed(*given, "evaluate.engine=transformers"))["warnings"]
    assert "transformers loads them, 746.38 GiB dequantised, and a node's GPUs have 632.00 GiB" in said
    online = make_plan(composed(*given, "train.hidden_states=online", "plan.ranks_per_node=1"))
    assert online["training"]["memory by phase"]["forward"]["verifier's weights"] == pytest.approx(
        400.7e9 * 2 / 8, 0.01
    )
    fp8 = verifier_shape(composed("experiment=llama4_maverick_fp8", "name=x"))
    assert fp8.loaded_bytes == fp8.weight_bytes


@pytest.mark.parametrize("experiment", PUBLISHED)
def test_parameters_are_those_published(experiment):
    """Within 1 %, and 2 % of the rounded 17; of Maverick the text decoder alone is counted, its image tower has 0.9."""
    shape = verifier_shape(composed(f"experiment={experiment}", "name=x"))
    total, active = PUBLISHED[experiment]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    active_with_embedding = shape.active + shape.text.vocab_size * shape.text.hidden_size
    assert active_with_embedding / 1e9 == pytest.approx(active, rel=0.02)


H, Q, K = 4096, 4096, 1024  # of Llama-3.1-8B: widths of the state, of queries, and of keys
FURTHER = H * (Q + 2 * K) + Q * H + 3 * H * 14336 + 2 * H  # parameters of a further layer
BIASES = Q + 2 * K + H


@pytest.mark.parametrize(
    ("options", "more"),
    [
        (["norm_before_fc=true"], 3 * H),
        (["norm_before_fc=true", "fc_norm=false", "norm_before_residual=true"], 0),  # as Speculators
        (["attention_bias=true"], BIASES),
        (["qk_norm=true"], 2 * 128),
        (["aux_layers=[1,5,9,28]"], H * H + H),
        (["num_layers=3"], 2 * FURTHER),
        (["num_layers=5", "attention_bias=true", "qk_norm=true"], 4 * FURTHER + 5 * (BIASES + 2 * 128)),
        (["sliding_window=2048"], 0),
    ],
)
def test_parameters_of_a_head_are_those_of_its_form(options, more):
    default, head = (
        make_plan(composed("experiment=llama31_8b", "name=x", *(f"draft.{option}" for option in given)))["head"]
        for given in ([], options)
    )
    assert head["parameters"] - default["parameters"] == head["trained"] - default["trained"] == more


def test_of_lora_the_low_rank_changes_alone_are_trained():
    options = ["experiment=llama31_8b", "name=x", "adapt.head=a/head"]
    whole, lora = (make_plan(composed(*options, *more)) for more in ([], ["train.lora_rank=16"]))
    sides = (3 * H + H) + (2 * H + Q) + 2 * (2 * H + K) + (Q + H) + 3 * (H + 14336)  # fc, q, k and v, o, gate up down
    assert lora["head"]["trained"] == lora["head"]["parameters"] - whole["head"]["parameters"] == 16 * sides
    moments = (made["training"]["memory by phase"]["update"]["Adam's two moments"] for made in (whole, lora))
    assert next(moments) > 50 * next(moments)


EXPERTS = 24 * 128 * 3 * 5120 * 8192  # of Maverick's 24 layers with experts


@pytest.mark.parametrize(
    ("experiment", "expected"),
    [
        ("llama4_maverick_fp8", EXPERTS + 2 * (400.7e9 - EXPERTS)),
        ("llama4_maverick_w4a16", EXPERTS * (4 + 16 / 128) / 8 + 2 * (400.7e9 - EXPERTS)),
        ("llama31_405b_fp4", 401.65e9 * 4.5 / 8 + 2 * 4.2e9),  # embedding and lm_head stay in BF16
    ],
)
def test_quantised_weights_take_what_their_bits_do(experiment, expected):
    shape = verifier_shape(composed(f"experiment={experiment}", "name=x"))
    assert shape.weight_bytes == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize(
    ("stated", "bits"),
    [
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 8),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, 4 + 8 / 16),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, 4 + 20 / 128),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, 8),
        ({"quant_method": "mxfp4"}, 4 + 8 / 32),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, 8),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
            },
            4.5,
        ),
    ],
)
def test_every_known_method_says_its_bits(stated, bits):
    layers = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)  # matrices of Llama-3.1-8B
    config = composed("experiment=llama31_8b", "name=x")
    dense = verifier_shape(config).weight_bytes
    config.verifier.shapes["quantization_config"] = stated
    assert verifier_shape(config).weight_bytes == pytest.approx(dense - layers * 2 + layers * bits / 8, rel=1e-6)
    config.verifier.shapes["quantization_config"] = {**stated, "modules_to_not_convert": ["model.layers.*.mlp"]}
    kept = 32 * 3 * 4096 * 14336
    expected = dense - (layers - kept) * 2 + (layers - kept) * bits / 8
    assert verifier_shape(config).weight_bytes == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("stated", [{"quant_method": "magic"}, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}])
def test_weights_of_an_unknown_method_are_not_counted_as_dense(stated):
    config = composed("experiment=llama31_8b", "name=x")
    config.verifier.shapes["quantization_config"] = stated
    with pytest.raises(ValueError, match=f"{' '.join(stated.values())}, and how many bits .* is not known"):
        verifier_shape(config)


def test_a_config_json_goes_before_the_shapes(tmp_path):
    path = tmp_path / "config.json"
    AutoConfig.for_model("llama", num_hidden_layers=9, hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path)
    config = composed("experiment=llama31_8b", "name=x", f"plan.verifier_config={path}")
    assert verifier_shape(config).text.num_hidden_layers == 9
    with pytest.raises(ValueError, match=r"plan.verifier_config must be the path of a config.json, got /nowhere"):
        verifier_shape(composed("experiment=llama31_8b", "name=x", "plan.verifier_config=/nowhere"))


def test_what_does_not_fit_a_gpu_is_said_with_the_option_to_change(tmp_path):
    common = ["experiment=llama31_8b", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=100"]
    for options, sentence in {
        ("plan.gpu_memory_gib=8",): "train.checkpoint_activations=true, or train.batch_tokens lower",
        ("train.hidden_states=online", "plan.gpu_memory_gib=20"): "set plan.ranks_per_node lower",
        (
            "train.hidden_states=online",
            "plan.gpus_per_node=1",
            "plan.gpu_memory_gib=20",
        ): "verifier's weights: set train.checkpoint_activations=true and deepspeed=zero2_offload, or train.hidden_s",
        ("plan.num_nodes=2",): "train.packs_per_step=8 must be a multiple of the 16 ranks: set it to 16",
        ("plan.mean_tokens=9000",): "train.batch_tokens=8192 is cut or dropped: raise it",
        ("plan.gpu_memory_gib=1",): "serve it over several nodes",
    }.items():
        made = make_plan(composed(*common, *options))
        assert any(sentence in warning for warning in made["warnings"]), (options, made["warnings"])


def test_the_walk_says_of_online_training_what_the_plan_does(tmp_path):
    given = ["experiment=llama4_maverick_fp8", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=20", "plan.num_nodes=2"]
    given += ["train.packs_per_step=16", "train.hidden_states=online", "plan.ranks_per_node=1"]
    saving = ["train.checkpoint_activations=true", "deepspeed=zero2_offload"]
    (said,) = make_plan(composed(*given))["warnings"]
    assert "training needs 91.69 GiB of a GPU's 79.00 GiB" in said
    assert "ranks_per_node" not in said
    assert make_plan(composed(*given, "plan.gpu=h200"))["warnings"] == []
    assert make_plan(composed(*given, *saving))["warnings"] == []


def test_without_any_number_of_conversations_the_option_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"plan.conversations is required"):
        make_plan(composed("experiment=llama31_8b", "name=x", f"runs_dir={tmp_path}", "data.limit=null"))


def test_tokens_are_those_of_the_artifacts_where_there_are_some(finished, run):
    copy_parts(finished, run)
    counts = read_manifest(run.path / "hidden_states", "hidden_states")["counts"]
    stored = make_plan(composed(*run.arguments()))
    assert [stored["tokens"][name] for name in ("tokens", "counted")] == [counts["tokens"], counts["counted_tokens"]]
    (run.path / "hidden_states" / "manifest.json").unlink()
    answered = make_plan(composed(*run.arguments()))
    written = read_manifest(run.path / "conversations", "conversations")["counts"]["completion_tokens"]
    assert answered["tokens"]["counted"] == written
    assert "plan.counted_share" in answered["tokens"]["source"]


def test_the_command_prints_a_table_or_json_and_keeps_it(run):
    options = ["plan.mean_tokens=200", "plan.conversations=1000", "plan.gpus_per_node=1", "plan.disk_tb=1"]
    text = run("plan", *options).stdout
    for part in ("disk", "memory of a GPU in training (ZeRO 1", "nothing to warn of: all of it fits"):
        assert part in text
    printed = json.loads(run("plan", *options, "plan.json=true", "plan.save=true").stdout)
    assert printed == json.loads((run.path / "plan.json").read_text())
    assert "time" not in text.split()
    assert not {"stages", "price"} & printed.keys()


@pytest.mark.parametrize(
    "name",
    ["price_per_gpu_hour", "decode_utilisation", "read_utilisation", "train_utilisation", "acceptance_length"],
)
def test_options_of_hours_are_gone(name, capfd):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "experiment=llama31_8b", "name=x", f"plan.{name}=0.5"])
    assert exit_.value.code == 2
    assert f"plan.{name} is not an option" in capfd.readouterr().err


def test_the_plan_in_the_walk_is_what_the_command_named_there_prints(capsys):
    text = (Path(fledge.conf.__file__).parents[1] / "docs" / "recipes" / "maverick.md").read_text()
    command = next(line.split() for line in text.splitlines() if line.startswith("fledge plan"))
    plan(composed(*command[2:]))
    assert capsys.readouterr().out in text


@pytest.mark.parametrize(
    ("dtype", "last"),
    [
        (StateDtype.bfloat16, LastStates.all),
        (StateDtype.float8, LastStates.all),
        (StateDtype.float8, LastStates.counted),
    ],
)
def test_a_dump_is_as_large_as_planned_within_a_hundredth(dtype, last, finished, run, monkeypatch):
    (run.path).mkdir(parents=True)
    (run.path / "conversations").symlink_to(finished.path / "conversations")
    options = [f"dump.dtype={dtype.name}", f"dump.last_states={last.value}", "dump.shard_tokens=100000"]
    run("dump", *options)
    planned = make_plan(composed(*run.arguments(*options)))["disk"]["hidden states"]
    measured = sum(path.stat().st_size for path in (run.path / "hidden_states").glob("shard-*.safetensors"))
    print(f"planned {planned}, measured {measured}")
    assert planned == pytest.approx(measured, rel=0.01)
    total = sum(make_plan(composed(*run.arguments(*options)))["disk"].values())
    for share_of_rest, warned in ((1.5, False), (0.5, True)):  # the store is there: the rest is still to be written
        usage = types.SimpleNamespace(free=share_of_rest * (total - measured))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        made = make_plan(composed(*run.arguments(*options)))
        assert any("of disk and" in sentence for sentence in made["warnings"]) is warned


def test_a_checkpoint_is_as_large_as_planned_within_a_twentieth(finished):
    made = make_plan(composed(*finished.arguments(), "plan.gpus_per_node=1"))
    (planned,) = (size for name, size in made["disk"].items() if name.startswith("checkpoints"))
    folder = next((finished.path / "training" / "checkpoints").glob("step-*"))
    measured = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    keep = composed(*finished.arguments()).train.keep_checkpoints
    print(f"planned {planned / (keep + 2)}, measured {measured}")
    assert planned / (keep + 2) == pytest.approx(measured, rel=0.05)


def test_memory_grows_with_the_batch_and_shrinks_with_ranks(tmp_path):
    def memory(*options: str) -> dict[str, int]:
        made = make_plan(composed("experiment=llama31_8b", "name=x", f"runs_dir={tmp_path}", *options))
        return made["training"]["memory by phase"]["forward"]

    usual, long, many = memory(), memory("train.batch_tokens=16384"), memory("plan.num_nodes=2")
    assert long["activations of the unroll"] == 2 * usual["activations of the unroll"]
    assert many["Adam's two moments"] == usual["Adam's two moments"] // 2
    assert (
        memory("train.checkpoint_activations=true")["activations of the unroll"]
        < 0.5 * usual["activations of the unroll"]
    )
    online = memory("train.hidden_states=online", "plan.ranks_per_node=4")
    assert online["verifier's weights"] == pytest.approx(16.06e9 / 2, rel=0.01)


def test_hoped_for_acceptance_becomes_a_vllm_command_and_the_config_of_such_a_head(tmp_path, capsys):
    rates = "plan.acceptance_rates=[0.7,0.5,0.5]"
    plan(composed("experiment=llama31_8b", "name=x", f"runs_dir={tmp_path}", "plan.disk_tb=100", rates))
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("vllm serve "))
    verifier, option, value = shlex.split(command)[2:]
    speculative = json.loads(value)
    assert (verifier, option) == ("meta-llama/Llama-3.1-8B-Instruct", "--speculative-config")
    assert (speculative["num_speculative_tokens"], speculative["synthetic_acceptance_rates"]) == (3, [0.7, 0.5, 0.5])
    head = json.loads((Path(speculative["model"]) / "config.json").read_text())
    assert (head["draft_vocab_size"], head["hidden_size"]) == (32000, 4096)


@pytest.mark.parametrize("rates", ["[]", "[0.5,0.6]", "[1.2]", "[0.5,-0.1]"])
def test_rates_that_no_head_can_have_are_refused(rates):
    with pytest.raises(ValueError, match=r"plan.acceptance_rates must be shares between 0 and 1, none above the one"):
        composed("experiment=llama31_8b", "name=x", f"plan.acceptance_rates={rates}")
