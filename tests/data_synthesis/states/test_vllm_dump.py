"""vLLM as the engine of a dump: its states are the transformers engine's. `make test-serving` runs those with vLLM."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from builders import SMALL_DECODER, SMALL_LLAMA4, SMALL_VISION, copy_parts
from fledge.conf.schema import Config, Device, Dtype, DumpConfig, VerifierConfig
from fledge.data_synthesis.states.transformers_engine import TransformersEngine
from fledge.data_synthesis.states.vllm_engine import (
    VllmEngine,
    check_readable,
    last_words,
    llm_options,
    worker_environment,
)
from fledge.data_synthesis.store.shard import Sample
from fledge.models.verifier.config import load_config
from fledge.models.verifier.model import Verifier

LENGTHS = (17, 1, 900, 2, 300)
AUX_LAYERS = {
    "LlamaForCausalLM": [1, 3, 7],  # the last layer's output is also the last state before its norm
    "Qwen3ForCausalLM": [1, 3, 4],
    "Llama4ForCausalLM": [1, 3, 4],
    "Llama4ForConditionalGeneration": [0, 6],
}


def random_verifier(architecture: str, tokenizer: transformers.PreTrainedTokenizerBase, folder: Path) -> VerifierConfig:
    """Save a small model of the class, as it is initialised, but for norms that do something."""
    sizes = {
        **SMALL_DECODER,
        **(SMALL_LLAMA4 if "Llama4" in architecture else {"intermediate_size": 128}),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,  # layers that change what they are given
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model_class = getattr(transformers, architecture)
    if model_class.config_class is transformers.Llama4Config:
        config = transformers.Llama4Config(
            text_config={**sizes, "attention_chunk_size": 512}, vision_config=SMALL_VISION
        )
    else:
        config = model_class.config_class(**sizes)
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return VerifierConfig(path=str(folder), dtype=Dtype.float32, device=Device.cpu)


def samples_of(vocab_size: int, lengths: tuple[int, ...] = LENGTHS) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(vocab_size, (n,), generator=generator, dtype=torch.int32) for n in lengths]
    return [Sample(str(i), ids, torch.ones_like(ids, dtype=torch.uint8)) for i, ids in enumerate(sequences)]


def configure(folder: Path, verifier: VerifierConfig, python: str | None = None, **options: object) -> Config:
    dump = DumpConfig(max_length=1000, batch_tokens=1024, vllm_python=python, vllm_options=options)
    return Config(name="run", runs_dir=str(folder), verifier=verifier, dump=dump)


@pytest.fixture
def in_vllm():
    """Start engines, and end those that a test has left."""
    engines = []

    def start(folder: Path, verifier: VerifierConfig, aux_layers: list[int], **options: object) -> VllmEngine:
        options = {"kv_cache_memory_bytes": 256 << 20, **options}
        engines.append(VllmEngine(configure(folder, verifier, os.environ["FLEDGE_VLLM_PYTHON"], **options), aux_layers))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def all_gone(processes: list[psutil.Process], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def processes_of(guard: int) -> list[psutil.Process]:
    return [psutil.Process(guard), *psutil.Process(guard).children(recursive=True)]


@pytest.mark.serving
@pytest.mark.parametrize("architecture", AUX_LAYERS)
def test_vllms_states_are_the_transformers_engines(tmp_path, verifier, in_vllm, architecture):
    config, aux_layers = (
        random_verifier(architecture, verifier.tokenizer, tmp_path / "verifier"),
        AUX_LAYERS[architecture],
    )
    samples = samples_of(len(verifier.tokenizer))
    expected = {n: states for n, *states in TransformersEngine(Verifier.load(config, aux_layers), 1024).read(samples)}
    engine = in_vllm(tmp_path, config, aux_layers)
    for number, *states in engine.read(samples):
        for ours, theirs in zip(states, expected.pop(number), strict=True):
            print(
                architecture,
                LENGTHS[number],
                f"differ by {(ours - theirs).abs().max():.1e} of {theirs.abs().max():.1f}",
            )
            torch.testing.assert_close(ours, theirs, rtol=0, atol=4e-5)
    assert not expected
    assert not list(engine._folder.iterdir()), "files of states are deleted as soon as they are read"
    engine.close()
    assert not engine._folder.exists()


@pytest.mark.serving
def test_states_that_do_not_give_vllms_probabilities_and_vllms_death_are_told(tmp_path, verifier, in_vllm):
    config = random_verifier("LlamaForCausalLM", verifier.tokenizer, tmp_path / "verifier")
    config = dataclasses.replace(config, dtype=Dtype.bfloat16)
    samples = samples_of(len(verifier.tokenizer))
    engine = in_vllm(tmp_path, config, [1, 3, 4])
    next(engine.read(samples))  # and the rest is not waited for
    whole = {number: last for number, _, last in engine.read(samples)}
    assert sorted(whole) == list(range(len(samples)))
    assert {last.dtype for last in whole.values()} == {torch.bfloat16}
    weight = engine._norm.weight.clone()
    engine._norm.weight.copy_(weight.flip(0))
    with pytest.raises(
        ValueError, match=r"^dump.engine=vllm: lm_head times the last state of \d, normed, does not give"
    ):
        list(engine.read(samples))
    engine._norm.weight.copy_(weight)
    processes = processes_of(engine._process.pid)
    processes[-1].kill()
    with pytest.raises(
        ValueError, match=r"^dump.engine=vllm: vLLM ended \(exit code 1\), having said: .*EngineDeadError"
    ):
        list(engine.read(samples))
    assert all_gone(processes, 30)
    assert not engine._folder.exists()


@pytest.mark.serving
def test_nothing_of_vllm_outlives_a_killed_dump(tmp_path, verifier):
    random_verifier("LlamaForCausalLM", verifier.tokenizer, tmp_path / "verifier")
    script = tmp_path / "dump.py"
    script.write_text(
        "import os, time\n"
        "from pathlib import Path\n"
        "from fledge.conf.schema import Device, Dtype, VerifierConfig\n"
        "from fledge.data_synthesis.states.vllm_engine import VllmEngine\n"
        "from test_vllm_dump import configure\n"
        f"verifier = VerifierConfig(path={str(tmp_path / 'verifier')!r}, dtype=Dtype.float32, device=Device.cpu)\n"
        f"config = configure(Path({str(tmp_path)!r}), verifier, os.environ['FLEDGE_VLLM_PYTHON'])\n"
        "engine = VllmEngine(config, [1, 3, 4])\n"
        "print('READY', engine._process.pid, engine._folder, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    dump = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    ready = next(line for line in dump.stdout if line.startswith("READY")).split()
    processes = processes_of(int(ready[1]))
    assert len(processes) > 3, "the guard, the worker and what vLLM has started"
    maps = {map_.path for process in processes for map_ in process.memory_maps()}
    shared = [path for path in maps if path.startswith("/dev/shm/") and Path(path).exists()]
    assert shared, "vLLM's processes talk through shared memory"
    dump.send_signal(signal.SIGKILL)
    dump.communicate()
    assert all_gone(processes, 40)
    assert not [path for path in (ready[2], *shared) if Path(path).exists()]


@pytest.mark.serving
def test_what_vllm_refuses_is_told_in_its_words(tmp_path, verifier_config, in_vllm):
    with pytest.raises(
        ValueError, match=r"vLLM ended \(exit code 1\), having said: .*no_such_option.*dump.vllm_options"
    ):
        in_vllm(tmp_path, verifier_config, [1, 3, 4], no_such_option=1)


def test_a_python_without_vllm_is_refused(tmp_path, verifier_config):
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    with pytest.raises(ValueError, match=r"^dump.vllm_python must be .* got /.*: no vllm is installed there$"):
        VllmEngine(configure(tmp_path, verifier_config, python), [1, 3, 4])
    with pytest.raises(ValueError, match=r"^dump.vllm_python must be .* got /no/python \(No such file or directory\)$"):
        VllmEngine(configure(tmp_path, verifier_config, "/no/python"), [1, 3, 4])


def test_a_vllm_that_extracts_no_hidden_states_is_refused(tmp_path, verifier_config, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("__version__ = '0.9.2'\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"^dump.vllm_python must be .*: its vLLM 0.9.2 is too old to extract"):
        VllmEngine(configure(tmp_path, verifier_config), [1, 3, 4])


def test_a_worker_that_dies_is_told_with_its_last_words(tmp_path, verifier_config, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise RuntimeError('no such device')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"vLLM ended \(exit code 1\), having said: RuntimeError: no such device \(whole"
    ):
        VllmEngine(configure(tmp_path, verifier_config), [1, 3, 4])
    assert "Traceback" in (tmp_path / "run" / "vllm-00000.log").read_text()


def test_a_signal_that_ends_vllm_too_asks_for_another_start(finished, run, tmp_path):
    copy_parts(finished, run, "conversations")
    vllm = tmp_path / "python"
    vllm.write_text('#!/bin/sh\nkill -TERM "$2"\nexit 3\n')  # as Slurm does with all processes of a step
    vllm.chmod(0o755)
    done = run("dump", "dump.engine=vllm", f"dump.vllm_python={vllm}", code=75)
    assert "dump: stopped by SIGTERM; the same command goes on" in done.stderr
    vllm.write_text("#!/bin/sh\nexit 3\n")
    done = run("dump", "dump.engine=vllm", f"dump.vllm_python={vllm}", code=2)
    assert "vLLM ended (exit code 3)" in done.stderr


def test_options_that_fledge_sets_are_refused(tmp_path, verifier_config):
    with pytest.raises(ValueError, match=r"^dump.vllm_options must leave dtype, kv_transfer_config to fledge"):
        VllmEngine(configure(tmp_path, verifier_config, kv_transfer_config={}, dtype="float32"), [1, 3, 4])


def test_vllm_has_room_for_a_token_after_the_longest_sample(tmp_path, verifier_config):
    text = load_config(verifier_config)
    options = llm_options(configure(tmp_path, verifier_config), text, [2, 4, 8])
    assert options["max_model_len"] == 1001
    assert options["max_num_batched_tokens"] == 1024
    given = llm_options(
        configure(tmp_path, verifier_config, max_model_len=300, tensor_parallel_size=8), text, [2, 4, 8]
    )
    assert given["max_model_len"] == 300
    assert given["tensor_parallel_size"] == 8
    config = configure(tmp_path, verifier_config, max_model_len=300)
    check_readable(config, ["0"], [299], [0])
    with pytest.raises(ValueError, match=r"max_model_len must be above .* got 300, and 1 has 300 tokens"):
        check_readable(config, ["0", "1"], [299, 300], [0, 0])
    with pytest.raises(ValueError, match=r"^dump.engine must be transformers for samples with images, got vllm: 0 has"):
        check_readable(config, ["0"], [299], [1])


def test_each_ranks_vllm_sees_its_own_gpus_and_no_ranks():
    ranks = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert worker_environment({**ranks, "HOME": "/h"}, 8) == {"HOME": "/h", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert worker_environment({**ranks, "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}, 2) == {"CUDA_VISIBLE_DEVICES": "GPU-b"}
    assert worker_environment({"HOME": "/h", "CUDA_VISIBLE_DEVICES": "2"}, 1) == {
        "HOME": "/h",
        "CUDA_VISIBLE_DEVICES": "2",
    }


def test_the_last_words_of_a_log_are_its_errors():
    log = (
        "(EngineCore pid=7) ERROR 11-25 16:42:55 [core.py:99] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ERROR 11-25 16:42:55 [core.py:99]     raise ValueError(\n"
        "(EngineCore pid=7) ERROR 11-25 16:42:55 [core.py:99] ValueError: no memory for the cache\n"
        "(EngineCore pid=7) ValueError: no memory for the cache\n"
        "Traceback (most recent call last):\n"
        "RuntimeError: Engine core initialization failed.\n"
        "goodbye\n"
    )
    assert last_words(log) == "ValueError: no memory for the cache / RuntimeError: Engine core initialization failed."
    assert last_words("a\n\nb\n") == "a / b"
    assert last_words("") == "nothing"
