"""Triton kernels without a GPU: right in the interpreter, and compiled ahead of time for a Hopper GPU."""

import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from builders import composed
from fledge.models import kernels
from fledge.models.kernels.self_check import Check, Figure, check_kernels, require_gpu

pytest.importorskip("triton")  # has no wheels beside Linux


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_equal_their_plain_twins_in_the_interpreter(which):
    tests = Path(__file__).parent
    files = [str(tests / f"interpreted_{name}.py") for name in ("kernels", "decoding", "self_check")]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-m", which, *files]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tests.parents[2])
    assert done.returncode == 0, done.stdout + done.stderr


# -- the self-check, but for the kernels themselves --------------------------------------------------------------------

CPU, GPU = torch.device("cpu"), torch.device("cuda")
AGREES, DIFFERS = {"outputs": Figure(1e-3, 3e-2)}, {"outputs": Figure(1e-3, 3e-2), "gradients": Figure(0.7, 3e-2)}


def check(result, setting="auto", device=CPU, **ranks):
    """Check one kernel whose comparison gives, or raises, this."""

    def compare():
        if isinstance(result, Exception):
            raise result
        return result

    return check_kernels("train.triton", setting, device, [Check("attention", compare)], **ranks)


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the kernels run on this CPU."""
    monkeypatch.setattr(kernels, "DEVICE", "cpu")


@pytest.mark.usefixtures("on_cpu")
def test_a_kernel_that_agrees_is_used_and_its_figures_are_logged_and_recorded(capsys):
    used, record = check(AGREES)
    assert used == {"attention"}
    assert record["attention"]["figures"] == {"outputs": [1e-3, 3e-2]}
    said = capsys.readouterr().out
    assert said.startswith("train.triton: Triton kernel attention agrees with its plain twin (outputs off by 1.0e-03, ")
    assert json.loads(json.dumps(record)) == record


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("result", "said"),
    [
        (DIFFERS, "differs from its plain twin (outputs off by 1.0e-03, allowed 3.0e-02, gradients off by 7.0e-01"),
        ({"outputs": Figure(float("nan"), 3e-2)}, "differs from its plain twin (outputs off by nan"),
        (RuntimeError("ptxas\n  fatal"), "fails (RuntimeError: ptxas fatal)"),
        (AssertionError("shape"), "fails (AssertionError: shape)"),
    ],
    ids=["differs", "no_number", "does_not_compile", "asserts"],
)
def test_a_kernel_that_is_not_right_is_left_out_with_one_warning_or_refused_if_it_is_asked_for(result, said, caplog):
    used, record = check(result)
    assert not used
    assert not record["attention"]["used"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    (warning,) = caplog.messages
    assert warning.startswith(f"train.triton: Triton kernel attention {said}")
    with pytest.raises(ValueError, match=r"train.triton=true: Triton kernel attention .*: set it to auto or false"):
        check(result, True)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kernel_that_is_wrong_on_one_rank_is_left_out_on_all(rank, caplog):
    told = {"used": False, "reason": "differs from its plain twin (outputs off by 0.4, allowed 0.03)"}
    of_ranks = {0: lambda own: [own, told], 1: lambda own: [told, own]}
    used, record = check(AGREES, gather=of_ranks[rank], speaks=rank == 0)
    assert not used
    assert record["attention"] == told
    assert len(caplog.messages) == (rank == 0)


def test_nothing_is_compiled_without_a_gpu_or_where_it_is_not_wanted(monkeypatch):
    assert check(AssertionError("run"))[1] == {"attention": {"used": False, "reason": "no GPU"}}
    assert check(AssertionError("run"), False)[1] == {"attention": {"used": False, "reason": "train.triton=false"}}
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: False)
    assert check(AssertionError("run"), device=GPU)[1]["attention"]["reason"] == "no Triton"


@pytest.mark.parametrize(
    ("option", "device", "lack"), [("train.triton", CPU, "no GPU"), ("evaluate.kernels", GPU, "no Triton")]
)
def test_kernels_that_are_asked_for_are_refused_where_there_is_no_gpu_or_no_triton(option, device, lack, monkeypatch):
    monkeypatch.setattr(kernels, "_triton_is_installed", lambda: False)
    with pytest.raises(ValueError, match=f"{option}=true needs a GPU and Triton, and there is {lack}: set it to auto"):
        require_gpu(option, True, device)


@pytest.mark.parametrize("option", ["train.triton", "evaluate.kernels"])
def test_the_options_of_kernels_are_auto_true_or_false(option):
    def given(*value):
        config = composed("name=x", "verifier.path=v", *(f"{option}={text}" for text in value))
        return operator.attrgetter(option)(config)

    assert [given(), given("auto"), given("true"), given("false")] == ["auto", "auto", True, False]
    with pytest.raises(ValueError, match=f"{option} must be auto, true or false, got 'yes'"):
        given("yes")


def compiled(kernel, launch, dtype, others, capability=90):
    """Compile for a GPU that is not there. `others`: types of the pointers that are not to `dtype`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    counts = {name: "i32" for name in kernel.arg_names if name.startswith("num_")}
    counts |= {name: "fp32" for name in kernel.arg_names if name in ("scale", "temperature") or name.endswith("_eps")}
    options = {name: launch[name] for name in ("num_warps", "num_stages")}
    values = {name: value for name, value in launch.items() if name not in options}
    constants = dict.fromkeys(values, "constexpr")
    pointers = {name: f"*{others.get(name, dtype)}" for name in kernel.arg_names if name not in {**counts, **constants}}
    types = {**pointers, **counts, **constants}
    signature = {name: types[name] for name in kernel.arg_names}
    # As torch's allocations and vocabularies are; without it shared memory would be reckoned wrong.
    aligned = [name for name in kernel.arg_names if name in pointers or name == "num_columns"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize(("capability", "shared_kib"), [(90, 227), (89, 99)])
def test_attention_compiles_for_gpus_and_fits_their_shared_memory(capability, shared_kib):
    from fledge.models.kernels import ttt_attention

    others = dict.fromkeys(["rows", "firsts", "places", "seers"], "i64") | dict.fromkeys(["lse", "delta"], "fp32")
    for name, launch in ttt_attention.launches(torch.bfloat16, 128, 4, shared_kib).items():
        kernel = compiled(getattr(ttt_attention, f"{name}_kernel"), launch, "bf16", others, capability)
        assert kernel.asm["cubin"]
        assert kernel.metadata.shared <= shared_kib * 1024, name
        if capability == 90 and name != "own":
            assert "wgmma" in kernel.asm["ptx"], name


def test_the_kl_loss_compiles_for_a_hopper_gpu():
    import kl_kernel

    wide = dict.fromkeys(["probabilities", "mass", "entropy", "kl", "overlap"], "fp32")
    others = {**wide, "targets": "i64", "top": "i64", "hits": "i1"}
    launch = {"block": kl_kernel.BLOCK, "num_warps": kl_kernel.NUM_WARPS, "num_stages": 3}
    kernel = compiled(kl_kernel.kl_kernel, launch, "bf16", others)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 227 * 1024
    assert "ld.global.v4" in kernel.asm["ptx"]  # 16 bytes at a time


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_of_speculative_decoding_compile_for_a_hopper_gpu(dtype):
    from fledge.models.kernels import choosing, decoding

    ids = ("tokens", "parents", "choices", "nodes", "chosen", "accepted", "sources", "targets", "drafts", "out")
    others = dict.fromkeys(ids, "i64") | {"q": "fp32", "accept": "fp64", "choose": "fp64"}
    kinds = [
        (True, True, False),
        (True, False, False),
        (True, False, True),
        (False, False, False),
        (False, False, True),
    ]
    launches = [
        (decoding.join_kernel, {"block": 8192}, decoding.JOIN_NUM_WARPS),
        *((decoding.way_kernel, {"chain": chain, "block": 64}, decoding.WAY_NUM_WARPS) for chain in (True, False)),
        (decoding.move_kernel, {"block": decoding.MOVE_BLOCK}, decoding.MOVE_NUM_WARPS),
        *(
            (
                choosing.choose_kernel,
                {"of_logits": of_logits, "greedy": greedy, "drawn": drawn, "block": choosing.BLOCK},
                choosing.NUM_WARPS,
            )
            for of_logits, greedy, drawn in kinds
        ),
    ]
    for kernel, constants, num_warps in launches:
        launch = {**constants, "num_warps": num_warps, "num_stages": 3}
        made = compiled(kernel, launch, dtype, others)
        assert made.asm["cubin"], kernel
        assert made.metadata.shared <= 48 * 1024, kernel  # what a kernel has without asking for more
        # As for one sequence and one draft token: Triton takes a count of one as a constant.
        ones = {name: 1 for name in kernel.arg_names if name.startswith("num_") and name != "num_columns"}
        assert compiled(kernel, {**launch, **ones}, dtype, others).asm["cubin"], kernel
