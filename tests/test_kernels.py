"""Triton kernels without a GPU: right in the interpreter, and compiled ahead of time for a Hopper GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # has no wheels beside Linux


def test_the_kernels_equal_their_plain_twins_in_the_interpreter():
    tests = Path(__file__).parent
    files = [str(tests / name) for name in ("interpreted_kernels.py", "interpreted_decoding.py")]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-q", "-m", "", *files]
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tests.parent)
    assert done.returncode == 0, done.stdout + done.stderr


def compiled(kernel, launch, dtype, others, capability=90):
    """Compile for a GPU that is not there. `others`: types of the pointers that are not to `dtype`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    counts = {name: "i32" for name in kernel.arg_names if name.startswith("num_")}
    counts |= {name: "fp32" for name in kernel.arg_names if name in ("scale", "temperature") or name.endswith("_eps")}
    constants = dict.fromkeys(launch.constants, "constexpr")
    pointers = {name: f"*{others.get(name, dtype)}" for name in kernel.arg_names if name not in {**counts, **constants}}
    types = {**pointers, **counts, **constants}
    signature = {name: types[name] for name in kernel.arg_names}
    # As torch's allocations and vocabularies are; without it shared memory would be reckoned wrong.
    aligned = [name for name in kernel.arg_names if name in pointers or name == "num_columns"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(kernel, signature, launch.constants, attributes)
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
    from fledge.models.kernels import kl_loss
    from fledge.models.kernels.ttt_attention import Launch

    wide = dict.fromkeys(["probabilities", "mass", "entropy", "kl", "overlap"], "fp32")
    others = {**wide, "targets": "i64", "top": "i64", "hits": "i1"}
    launch = Launch({"block": kl_loss.BLOCK}, kl_loss.NUM_WARPS, 3)
    kernel = compiled(kl_loss.kl_kernel, launch, "bf16", others)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 227 * 1024
    assert "ld.global.v4" in kernel.asm["ptx"]  # 16 bytes at a time


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_the_kernels_of_speculative_decoding_compile_for_a_hopper_gpu(dtype):
    from fledge.models.kernels import choosing, decoding
    from fledge.models.kernels.ttt_attention import Launch

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
        made = compiled(kernel, Launch(constants, num_warps, 3), dtype, others)
        assert made.asm["cubin"], kernel
        assert made.metadata.shared <= 48 * 1024, kernel  # what a kernel has without asking for more
