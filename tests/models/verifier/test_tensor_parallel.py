"""One verifier held by two processes together gives the states that one process gives."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import make_model, save_verifier
from builders import conversation_record, conversations_run, recorded_sequence
from fledge.conf.schema import HiddenStates, VerifierConfig
from fledge.data_synthesis.dump import dump
from fledge.data_synthesis.store.store import HiddenStateStore
from fledge.models.verifier.model import Verifier, VerifierOutput
from fledge.train.data.online import load_verifier
from quantised import quantise
from safetensors.torch import load_file, save_file

IDS = torch.arange(1, 41).repeat(2, 1)


def states(output: VerifierOutput) -> dict[str, torch.Tensor]:
    return {"aux": output.aux_hidden_states, "last": output.last_hidden_state, "logits": output.logits}


def write_states_of_this_rank(folder: Path) -> None:
    """Let this rank write what it gives of the verifier in a folder, and how many of its parameters are in parts."""
    from fledge.conf.schema import Device, Dtype
    from fledge.data_synthesis.states.transformers_engine import read_documents
    from fledge.models.verifier.model import check_capture

    config = VerifierConfig(str(folder), dtype=Dtype.float32, device=Device.cpu, tensor_parallel=True)
    verifier = Verifier.load(config)
    divided = sum(type(parameter).__name__ == "DTensor" for parameter in verifier.model.parameters())
    check_capture(verifier, IDS)
    assert len(list(read_documents(verifier, list(IDS), 80))) == 2, "its logits are checked"
    found = states(verifier.forward(IDS, use_cache=False)) | {"divided": torch.tensor(divided)}
    save_file({name: t.contiguous() for name, t in found.items()}, folder / f"rank-{os.environ['RANK']}.safetensors")


def test_two_ranks_hold_one_verifier_and_each_gives_all_of_its_states(tmp_path, verifier):
    configs = [
        save_verifier(make_model(name, 600, num_key_value_heads=2), verifier.tokenizer, tmp_path / name)
        for name in ("llama", "qwen3 moe", "llama 4")
    ]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, *launcher, __file__, *(config.path for config in configs)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    for config in configs:
        expected = states(Verifier.load(config).forward(IDS, use_cache=False))
        for rank in (0, 1):
            found = load_file(Path(config.path) / f"rank-{rank}.safetensors")
            assert found["divided"] > 8 * 4, "more than the attention of every layer"
            for part, values in expected.items():  # sums of float32 in another order
                torch.testing.assert_close(found[part], values, rtol=1e-4, atol=1e-5, msg=f"{config.path}: {part}")


def test_ranks_that_hold_one_verifier_dump_as_one_writer(tmp_path, verifier):
    config = save_verifier(make_model("llama", 600, num_key_value_heads=2), verifier.tokenizer, tmp_path / "verifier")
    sequences = [recorded_sequence(list(range(3, 3 + length)), (2, length)) for length in (9, 30, 17, 40, 25)]
    records = [conversation_record(f"s/{n}", "u", "a", sequences=[sequence]) for n, sequence in enumerate(sequences)]
    run = conversations_run(tmp_path, config, *records)
    run.train.hidden_states, run.dump.shard_tokens = HiddenStates.offline, 40
    dump(run)
    alone = HiddenStateStore(run.hidden_states_folder)
    run.verifier.tensor_parallel, run.dump.folder = True, str(tmp_path / "together")
    (tmp_path / "config.pickle").write_bytes(pickle.dumps(run))
    start = (
        "import pickle, sys; from fledge.data_synthesis.dump import dump; dump(pickle.load(open(sys.argv[1], 'rb')))"
    )
    (tmp_path / "start.py").write_text(start)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(tmp_path / "start.py"), str(tmp_path / "config.pickle")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    together = HiddenStateStore(run.hidden_states_folder)
    together.verify()
    assert together.ids == alone.ids
    for index in range(len(alone)):
        for name in ("aux_hidden_states", "last_hidden_state"):  # sums of float32 in another order
            found, expected = (getattr(store[index], name) for store in (together, alone))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_tensor_parallel_alone_is_refused(verifier_config):
    alone = VerifierConfig(verifier_config.path, device=verifier_config.device, tensor_parallel=True)
    with pytest.raises(ValueError, match=r"verifier\.tensor_parallel needs several ranks.*torchrun --nproc-per-node"):
        Verifier.load(alone)


def test_tensor_parallel_of_what_transformers_cannot_divide_is_refused(tmp_path, verifier):
    config = save_verifier(make_model("llama", 600), verifier.tokenizer, tmp_path)
    quantise(tmp_path, "fp8")
    config.tensor_parallel = True
    with pytest.raises(ValueError, match=r"verifier\.tensor_parallel must be false.*compressed-tensors"):
        Verifier.load(config)


def test_ranks_that_read_different_documents_are_refused_one_verifier_together(verifier_config):
    config = VerifierConfig(verifier_config.path, tensor_parallel=True)
    with pytest.raises(ValueError, match=r"verifier\.tensor_parallel must be false with train\.hidden_states=online"):
        load_verifier(config, [0], None)


if __name__ == "__main__":
    for folder in sys.argv[1:]:
        write_states_of_this_rank(Path(folder))
