"""The memory that the plan foresees, against what real training steps take."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fledge.models.head.config import DraftHeadConfig
from fledge.models.verifier.config import load_config
from fledge.slurm.plan.memory import TrainingShape, peak, training_memory
from training_memory import QUIET, Spec, configuration, prepare

SHAPES = {
    "float32, ZeRO 1, full vocabulary, two packs": (
        1,
        Spec(
            hidden_size=512,
            intermediate_size=1376,
            num_heads=8,
            num_kv_heads=4,
            vocab_size=8000,
            draft_vocab_size=8000,
            ttt_steps=3,
            batch_tokens=768,
            packs_per_step=2,
            zero_stage=1,
        ),
    ),
    "bfloat16, ZeRO 2, reduced vocabulary": (
        1,
        Spec(
            dtype="bfloat16",
            hidden_size=384,
            intermediate_size=2048,
            num_heads=6,
            num_kv_heads=2,
            vocab_size=8000,
            draft_vocab_size=4000,
            ttt_steps=4,
            batch_tokens=1536,
            zero_stage=2,
        ),
    ),
    "float32, ZeRO 3 on two ranks": (
        2,
        Spec(
            hidden_size=384,
            intermediate_size=2048,
            num_heads=6,
            num_kv_heads=2,
            vocab_size=12000,
            draft_vocab_size=6000,
            ttt_steps=4,
            batch_tokens=512,
            packs_per_step=2,
            zero_stage=3,
        ),
    ),
    "float32, ZeRO 1, three layers with every norm and bias": (
        1,
        Spec(
            hidden_size=384,
            intermediate_size=1024,
            num_heads=6,
            num_kv_heads=2,
            vocab_size=4000,
            draft_vocab_size=2000,
            ttt_steps=4,
            batch_tokens=1536,
            form={"num_layers": 3, "norm_before_fc": True, "attention_bias": True, "qk_norm": True},
        ),
    ),
    "float32, ZeRO 1, where the update needs most": (
        1,
        Spec(
            hidden_size=1024,
            intermediate_size=4096,
            num_heads=8,
            num_kv_heads=4,
            vocab_size=4000,
            draft_vocab_size=2000,
            ttt_steps=2,
            batch_tokens=128,
            zero_stage=1,
        ),
    ),
}


def foreseen(spec: Spec, ranks: int, folder: Path) -> dict[str, dict[str, int]]:
    config = configuration(spec, folder)
    head = DraftHeadConfig.from_verifier(config.draft, load_config(config.verifier))
    return training_memory(TrainingShape(head, config.train, config.deepspeed, 1.0, ranks, device="cpu"))


def measured(spec: Spec, ranks: int, folder: Path) -> list[int]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    script = Path(__file__).with_name("training_memory.py")
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(folder), json.dumps(dataclasses.asdict(spec))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **QUIET},
    )
    peaks = [
        int(peak) for peak in re.findall(r"PEAK \d+ (\d+)$", done.stdout, re.MULTILINE)
    ]  # maybe behind a rank's line
    assert len(peaks) == ranks, f"{done.stdout}\n{done.stderr}"
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="the resident size is read from /proc")
@pytest.mark.parametrize(
    ("ranks", "spec"),
    [pytest.param(*case, marks=[] if "ZeRO 2" in name else pytest.mark.slow) for name, case in SHAPES.items()],
    ids=SHAPES.keys(),
)
def test_the_peak_of_training_is_foreseen_within_a_tenth(ranks, spec, tiny_verifier_folder, tmp_path):
    small = Spec(dtype=spec.dtype, zero_stage=spec.zero_stage, packs_per_step=ranks)
    prepare(small, tmp_path / "small", str(tiny_verifier_folder))
    prepare(spec, tmp_path / "measured", str(tiny_verifier_folder))
    phases = foreseen(spec, ranks, tmp_path / "measured")
    phase, most = peak(phases)
    found = measured(spec, ranks, tmp_path)
    print(f"foreseen {most / 1e6:.1f} MB ({phase}), measured {[round(one / 1e6, 1) for one in found]} MB")
    for one in found:
        assert one == pytest.approx(most, rel=0.1)
