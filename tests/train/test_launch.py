"""Many processes: every launcher is understood, ranks that differ do not start, none waits for one that has ended."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from builders import Run, copy_folder, copy_parts
from commands import popen, script_result
from fledge.conf.runtime.launch import environments
from fledge.conf.runtime.rank_info import RankInfo, first_host, own_gpus, read_rank_info
from fledge.conf.schema import VerifierConfig
from fledge.data_synthesis.store.index import sidecar_checksums
from fledge.data_synthesis.store.store import write_index
from fledge.models.formats.training_folder import checkpoint_steps
from fledge.models.verifier.model import _placement
from fledge.train.metrics.tracking import read_metrics

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "node7",
    "MASTER_PORT": "4711",
}
BATCH_SCRIPT = {  # the shell of `sbatch -N2 -n3`, as Slurm 22 sets it
    "SLURM_JOB_ID": "41",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SRUN_TASK = {  # the last task of an srun in it
    **BATCH_SCRIPT,
    "SLURM_PROCID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


def test_a_process_without_a_launcher_is_alone():
    assert read_rank_info({}) == RankInfo()
    assert read_rank_info({"MASTER_ADDR": "node7", "MASTER_PORT": "4711"}) == RankInfo(), "a batch script exports them"


def test_torchrun_and_the_deepspeed_launcher_are_understood():
    assert read_rank_info(TORCHRUN) == RankInfo(3, 4, 1, 2, "node7", 4711)
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "LOCAL_WORLD_SIZE"}
    assert read_rank_info({**deepspeed, "LOCAL_SIZE": "2"}) == RankInfo(3, 4, 1, 2, "node7", 4711)
    assert read_rank_info({**SRUN_TASK, **TORCHRUN}).world == 4, "torchrun started by srun"
    assert read_rank_info(RankInfo(3, 4, 1, 2, "node7", 4711).environment()) == RankInfo(3, 4, 1, 2, "node7", 4711)


def test_a_task_of_srun_is_a_rank():
    place = read_rank_info(SRUN_TASK)
    assert (place.rank, place.world, place.local_rank, place.local_world, place.address) == (2, 3, 0, 1, "n1")
    assert 20000 <= place.port < 32000
    assert read_rank_info({**SRUN_TASK, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}).port == place.port
    assert read_rank_info({**SRUN_TASK, "SLURM_STEP_ID": "2"}).port != place.port, "two steps of a job at a time"
    elsewhere = read_rank_info({**SRUN_TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"})
    assert (elsewhere.address, elsewhere.port) == ("10.0.0.1", 4711)


def test_the_shell_of_a_slurm_job_is_no_rank():
    assert read_rank_info(BATCH_SCRIPT) == RankInfo()
    assert read_rank_info({**SRUN_TASK, "SLURM_NTASKS": "1"}) == RankInfo(), "a job submitted from inside a step"
    interactive = {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert read_rank_info(interactive) == RankInfo(), "the shell of salloc, where it runs as a step"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("n1", "n1"), ("n[1-2]", "n1"), ("gpu-a[08-11,20],m1", "gpu-a08"), ("r[0-1]n[3,5]-ib,x", "r0n3-ib"), ("a,b", "a")],
)
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_is_refused_by_what_is_missing(name):
    with pytest.raises(ValueError, match=rf"^{name} must be set where .*torchrun"):
        read_rank_info({key: value for key, value in TORCHRUN.items() if key != name})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "two")])
def test_impossible_ranks_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*got '?{value}"):
        read_rank_info({**TORCHRUN, name: value})


def test_the_gpus_of_a_node_are_dealt_out_whole_and_to_one_rank_each():
    def dealt(ranks: int, gpus: int) -> list[list[int]]:
        return [list(own_gpus(RankInfo(rank, ranks, rank, ranks), gpus)) for rank in range(ranks)]

    assert dealt(4, 8) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert dealt(8, 8) == [[gpu] for gpu in range(8)]
    assert dealt(1, 8) == [list(range(8))]
    assert dealt(4, 1) == [[0]] * 4, "each is shown one"
    for ranks, gpus in ((3, 8), (2, 3), (5, 5)):
        assert [gpu for own in dealt(ranks, gpus) for gpu in own] == list(range(gpus))
        assert all(dealt(ranks, gpus))
    with pytest.raises(ValueError, match="4 ranks were started on a node with 2 GPUs"):
        dealt(4, 2)
    assert list(own_gpus(RankInfo(1, 4, 1, 4, sees_own_gpus=True), 2)) == [0, 1], "srun --gpus-per-task=2"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def torch_environments() -> list[dict[str, str]]:
    port = free_port()
    return [RankInfo(rank, 2, rank, 2, "127.0.0.1", port).environment() for rank in range(2)]


def slurm_environments() -> list[dict[str, str]]:
    common = {
        **{"SLURM_JOB_ID": str(free_port()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"},
        **{"SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0"},
    }
    return [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


def launches() -> dict[str, tuple[list[dict[str, str]], int, list[int]]]:
    """Give every launch that the README names: its ranks' environments, GPUs that each sees, and the one it takes."""
    deepspeed = [{**place, "LOCAL_SIZE": place.pop("LOCAL_WORLD_SIZE")} for place in torch_environments()]
    mpirun = [{**place, "OMPI_COMM_WORLD_LOCAL_RANK": place["LOCAL_RANK"]} for place in torch_environments()]
    nodes = [RankInfo(node, 2, address="127.0.0.1", port=free_port()) for node in range(2)]
    nodes = [replace(node, port=nodes[0].port) for node in nodes]

    def own(**options: str) -> list[dict[str, str]]:
        return [{**place, **options} for place in slurm_environments()]

    return {
        "alone": ([{}], 8, [0]),
        "torchrun, as many as GPUs": (torch_environments(), 2, [0, 1]),
        "torchrun, fewer than GPUs": (torch_environments(), 8, [0, 4]),
        "torchrun, each shown one": (torch_environments(), 1, [0, 0]),
        "train.num_processes": (environments(2), 4, [0, 2]),
        "fledge submit": ([place for node in nodes for place in environments(2, node)], 8, [0, 4, 0, 4]),
        "srun, one task a GPU": (own(), 2, [0, 1]),
        "srun --gpus-per-task=1": (own(SLURM_GPUS_PER_TASK="1"), 1, [0, 0]),
        "srun --gpus-per-task=2": (own(SLURM_GPUS_PER_TASK="1"), 2, [0, 0]),
        "srun --tres-per-task=gres/gpu:1": (own(SLURM_TRES_PER_TASK="gres/gpu:1"), 1, [0, 0]),
        "srun --cpus-per-task=8": (own(SLURM_TRES_PER_TASK="cpu=8"), 2, [0, 1]),
        "deepspeed": (deepspeed, 4, [0, 2]),
        "torch's variables in mpirun": (mpirun, 8, [0, 4]),
    }


@pytest.mark.slow
def test_deepspeed_takes_the_gpu_that_fledge_trains_on_in_every_launch():
    cases = launches()
    given = {name: case[:2] for name, case in cases.items()}
    found = script_result(Path(__file__).with_name("device_calls.py"), input=json.dumps(given))
    for name, (_, _, devices) in cases.items():
        assert [rank["device"] for rank in found[name]] == [f"cuda:{device}" for device in devices], name
        for rank, device in zip(found[name], devices, strict=True):
            assert rank["current"] == [device], name
            assert rank["asked"] == {str(stage): [device] for stage in (2, 3)}, name


def test_what_ranks_are_told_gives_the_same_gpu_when_it_is_read_again():
    shown_two = RankInfo(1, 4, 1, 4, sees_own_gpus=True)
    for place, num_gpus in ((RankInfo(1, 2, 1, 2), 8), (RankInfo(3, 4, 3, 4), 1), (shown_two, 2), (RankInfo(), 8)):
        again = read_rank_info({**place.environment(num_gpus), "MASTER_PORT": "1"})
        assert own_gpus(again, num_gpus)[0] == own_gpus(place, num_gpus)[0]


@pytest.mark.parametrize(
    ("changes", "num_gpus", "device"), [({}, 8, 4), ({}, 2, 1), ({"SLURM_GPUS_PER_TASK": "1"}, 1, 0)]
)
def test_ranks_that_hold_one_verifier_together_tell_transformers_their_own_gpu(changes, num_gpus, device, monkeypatch):
    for name, value in {**slurm_environments()[1], **changes}.items():
        monkeypatch.setenv(name, value)
    for name in RankInfo().environment():  # what it sets goes away again
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("torch.cuda.device_count", lambda: num_gpus)
    for _ in range(2):  # a verifier may be loaded again
        _placement(VerifierConfig(path="none", tensor_parallel=True), None, None)
        assert os.environ["LOCAL_RANK"] == str(device)


class Pair:
    """Two ranks of training, each with options of its own, or a working folder."""

    def __init__(
        self,
        run: Run,
        environments: list[dict[str, str]],
        *own: str,
        common: tuple[str, ...] = (),
        folders: tuple[Path | None, Path | None] = (None, None),
    ) -> None:
        self.processes = [
            popen(
                run.command("train", "train.packs_per_step=2", *common, *([option] if option else [])),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                cwd=folder,
            )
            for option, environment, folder in zip(own or ("", ""), environments, folders, strict=True)
        ]

    def end(self, timeout_s: float = 120) -> list[tuple[int, str]]:
        """Give exit code and error sentences of each, whose processes must end by themselves."""
        try:
            errors = [process.communicate(timeout=timeout_s)[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        assert not any("Traceback" in text for text in errors), errors
        said = ["\n".join(line for line in text.splitlines() if "fledge: error:" in line) for text in errors]
        return list(zip((process.returncode for process in self.processes), said, strict=True))

    def wait_for(self, reached: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in self.processes), [p.communicate() for p in self.processes]
            time.sleep(0.01)


@pytest.fixture
def dumped(finished: Run, run: Run) -> Run:
    """A run that is ready to train."""
    return copy_parts(finished, run, "hidden_states")


def is_training(run: Run) -> bool:
    return any("train/loss" in record for record in read_metrics(run.path / "training"))


def older_store(store: Path, folder: Path) -> Path:
    """Copy a store without its last shard."""
    shutil.copytree(store, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / manifest["shards"].pop()["file"]).unlink()
    write_index(folder, manifest["shards"])
    changes = {"digest": "0123456789abcdef", "files": sidecar_checksums(folder)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))
    return folder


def test_the_deepspeed_launcher_trains_to_the_end(dumped):
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    options = dumped.arguments("train.max_steps=2", "train.packs_per_step=2")
    launcher = ["-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--master_port={free_port()}"]
    done = subprocess.run(
        [sys.executable, *launcher, "--module", "fledge.train", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert checkpoint_steps(dumped.path / "training" / "checkpoints") == [2]


def test_ranks_with_different_options_end_at_once_and_name_them(dumped):
    for code, said in Pair(dumped, slurm_environments(), "train.lr=1e-3", "train.lr=2e-3").end():
        assert code == 2
        assert "the ranks differ, rank 1 from rank 0 in train.lr: 0.001 -> 0.002" in said
    assert not (dumped.path / "training").exists()


def test_ranks_with_different_stores_end_at_once_and_name_them(dumped):
    folders = dumped.path / "hidden_states", older_store(dumped.path / "hidden_states", dumped.path / "older")
    for code, said in Pair(dumped, torch_environments(), *(f"dump.folder={folder}" for folder in folders)).end():
        assert code == 2
        assert "rank 1 from rank 0 in hidden_states" in said
        assert "0123456789abcdef" in said
    assert not (dumped.path / "training").exists()


def test_ranks_that_see_other_folders_do_not_take_a_checkpoint_for_saved(dumped, tmp_path):
    common = (f"dump.folder={dumped.path / 'hidden_states'}", "runs_dir=here", "train.max_steps=2")
    nodes = tmp_path / "node0", tmp_path / "node1"
    for node in nodes:
        node.mkdir()
    first, second = Pair(dumped, torch_environments(), common=common, folders=nodes).end()
    assert first[0] == 2
    assert "runs_dir must be one folder that all nodes see: rank 1 has written its part" in first[1]
    assert second[0] != 0
    assert not any(checkpoint_steps(node / "here" / "run" / "training" / "checkpoints") for node in nodes)


def test_ranks_that_would_go_on_from_different_checkpoints_end_at_once(finished, dumped, tmp_path):
    common = (f"dump.folder={dumped.path / 'hidden_states'}", "runs_dir=here")
    nodes = tmp_path / "node0", tmp_path / "node1"
    copy_folder(finished.path / "training", nodes[0] / "here" / "run" / "training")
    nodes[1].mkdir()
    for code, said in Pair(dumped, torch_environments(), common=common, folders=nodes).end():
        assert code == 2
        assert "rank 1 from rank 0 in newest checkpoint in runs_dir: [24] -> []" in said


def test_a_killed_rank_ends_the_others_with_a_message(dumped):
    pair = Pair(dumped, slurm_environments(), common=("train.max_steps=100000", "train.log_every=1"))
    pair.wait_for(lambda: is_training(dumped))
    pair.processes[1].send_signal(signal.SIGKILL)
    (code, said), _ = pair.end(timeout_s=30)
    assert code == 1
    assert "rank 0: rank 1 ended: see the log there" in said
    assert "start the same command again, training goes on from the newest checkpoint" in said


def test_an_error_of_one_rank_alone_ends_the_others_who_say_that_it_did(dumped):
    shard = dumped.path / "hidden_states" / "shard-00001.safetensors"  # rank 1 verifies the odd ones
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (code, said), (its_code, cause) = Pair(dumped, torch_environments()).end()
    assert (its_code, code) == (2, 1)
    assert f"rank 1: {shard}: loss_mask does not have its checksum" in cause
    assert "rank 0: rank 1 ended: see the log there" in said


ASLEEP = """
import time
from fledge.conf.schema import Config
from fledge.train.ranks.group import joined

with joined(Config(name="asleep")) as ranks:
    ranks.any_rank(False)
    print("joined", flush=True)
    time.sleep(600)
"""


def test_ranks_that_wait_for_something_else_notice_the_end_of_one_as_well():
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ASLEEP],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
                **RankInfo(rank, 3, rank, 3, "127.0.0.1", port).environment(),
            },
        )
        for rank in range(3)
    ]
    try:
        assert [process.stdout.readline() for process in processes] == ["joined\n"] * 3
        processes[1].send_signal(signal.SIGKILL)
        said = [process.communicate(timeout=30)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 2):
        assert processes[rank].returncode == 1
        assert f"rank {rank}: rank 1 ended: see the log there" in said[rank]


def test_a_rank_that_hangs_ends_the_others_after_the_timeout(dumped):
    common = ("train.max_steps=100000", "train.log_every=1", "train.collective_timeout_s=3")
    pair = Pair(dumped, torch_environments(), common=common)
    pair.wait_for(lambda: is_training(dumped))
    pair.processes[1].send_signal(signal.SIGSTOP)
    try:
        _, error = pair.processes[0].communicate(timeout=30)
    finally:
        for process in pair.processes:
            process.kill()
            process.wait()
    assert pair.processes[0].returncode == 1
    assert "rank 0: another rank has not answered for train.collective_timeout_s=3: end the one that hangs" in error
