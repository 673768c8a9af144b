"""The code for GPUs on a machine without one (tests/models/kernels/fake_gpu.py says what that shows, and what not)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_step
from fledge.conf.schema import DeepSpeedConfig, TrainConfig
from fledge.slurm.plan import memory as training_memory
from fledge.slurm.plan.memory import TrainingShape

pytest.importorskip("triton")  # has no wheels beside Linux

TESTS = Path(__file__).parent
TORCH = Path(torch.__file__).parent


@pytest.fixture(scope="module")
def run_fake(tmp_path_factory):
    """Give a function that runs a command of tests/models/kernels/fake_gpu.py and gives what it printed."""
    library = tmp_path_factory.mktemp("fake_gpu") / "fake_gpu.so"
    make = ["c++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", str(TESTS / "fake_gpu.cpp")]
    subprocess.run([*make, "-o", str(library), f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)

    def run(*arguments):
        paths = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(TORCH / "lib"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(TESTS / "fake_gpu.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **paths})
        assert done.returncode == 0, done.stderr[-6000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run


SMALL = (
    "seq_len=256 ttt_steps=3 hidden_size=64 intermediate_size=96 num_attention_heads=2 num_key_value_heads=1 "
    "head_dim=32 "
)
WAYS = {
    "frozen lm_head": "train_lm_head=false",
    "reduced vocabulary": "draft_vocab_size=4000 documents=3 counted_share=0.6",
    "recomputed": "recompute=true num_layers=2 counted_share=0.5",
    "kernels": "triton=true loss_kernel=true documents=3 counted_share=0.6",
    "kernels, recomputed": "triton=true loss_kernel=true recompute=true num_layers=2",
}
LOSSES = ["lk_lambda", "reverse_kl", "acceptance_length"]
KERNELS = {"forward_kernel", "dq_kernel", "dkv_kernel", "own_kernel", "kl_kernel"}


def test_a_training_step_stays_on_its_gpu_and_waits_for_nothing(run_fake):
    steps = [*WAYS.values(), *(f"loss={loss} documents=2 counted_share=0.7" for loss in LOSSES)]
    results = dict(zip([*WAYS, *LOSSES], run_fake("step", *(SMALL + step for step in steps)), strict=True))
    for name, result in results.items():
        assert result["without_gradient"] == (["lm_head.weight"] if name == "frozen lm_head" else []), name
        assert set(result["launched"]) == (KERNELS if name.startswith("kernels") else set()), name


def test_attention_keeps_nothing_of_the_size_of_all_rows_squared(run_fake):
    heads = "hidden_size=64 intermediate_size=96 num_attention_heads=32 num_key_value_heads=8 head_dim=16"
    (result,) = run_fake("step", f"{heads} seq_len=8192 ttt_steps=1 vocab_size=1000 draft_vocab_size=1000")
    squared = 32 * 8192**2 * 4
    print(f"scores of all rows {squared / 1e9:.2f} GB, peak {result['peak'] / 1e9:.2f} GB")
    assert result["peak"] < 0.3 * squared


def test_a_new_head_is_fitted_on_its_gpu(run_fake):
    run_fake("fit", *(SMALL + form for form in ("", "num_layers=2 documents=3 counted_share=0.6", "sliding_window=64")))


# Of full width; activations, the loss and its gradients make up most of it.
LARGE = ["preset=maverick seq_len=1024 recompute=true", "preset=llama31_8b seq_len=1024 documents=3 counted_share=0.6"]


@pytest.mark.slow
def test_the_memory_of_a_step_on_a_gpu_is_what_the_plan_says(run_fake, monkeypatch):
    monkeypatch.setattr(training_memory, "_norm", lambda _: 8)  # torch for the CPU has no fused norm: twice float32
    for arguments, result in zip(LARGE, run_fake("step", *LARGE), strict=True):
        options = training_step.parse(arguments.split())
        train = TrainConfig(
            ttt_steps=options.ttt_steps,
            batch_tokens=options.seq_len,
            checkpoint_activations=options.recompute,
            packs_per_step=1,
        )
        head = training_step.head_config(options)
        shape = TrainingShape(head, train, DeepSpeedConfig(zero_stage=0), options.counted_share, ranks=1)
        phases = training_memory.training_memory(shape)
        others = ("Adam's two moments", "DeepSpeed's bucket")
        foreseen = max(
            sum(size for part, size in phases[phase].items() if part not in others) for phase in ("forward", "backward")
        )
        print(f"{arguments}: foreseen {foreseen / 1e9:.2f} GB, {result['peak'] / 1e9:.2f} GB")
        assert result["peak"] == pytest.approx(foreseen, rel=0.1)


def test_a_round_of_decoding_stays_on_its_gpu_and_waits_once(run_fake):
    for result in run_fake("decode"):
        assert result["rounds"] == result["reads"] > 0
        assert bool(result["launched"]) == result["kernels"]


@pytest.mark.slow
def test_a_dump_copies_by_pinned_memory_and_waits_once_a_batch(run_fake):
    for result in run_fake("dump"):
        assert set(result["waits"]) == {"synchronize", "value"}
        assert result["waits"]["value"] == 1, "whether the logits are those of the states, once a reading"
        assert 1 < result["waits"]["synchronize"] <= result["forwards"]
        assert result["pinned"] > 40 * 3, "what the verifier reads, and what is stored of each sample"
