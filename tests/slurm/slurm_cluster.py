"""A real Slurm of several logical nodes on this machine: munged, slurmctld and a slurmd a node, in one folder.

Neither systemd nor cgroups nor anything under /etc is needed; the daemons are those of Debian's packages, started by
root. Where node names do not resolve, jobs meet at 127.0.0.1.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from servers import free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=20
MinJobAge={remember_s}
AccountingStorageType=accounting_storage/none
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket=2 ThreadsPerCore=1 RealMemory=8000\n"
)


def missing() -> list[str]:
    """Give the daemons that are not installed."""
    return [daemon for daemon in DAEMONS if shutil.which(daemon) is None]


@contextlib.contextmanager
def slurm_cluster(num_nodes: int = 2, remember_s: int = 3600) -> Iterator[Path]:
    """Run a Slurm whose commands work inside the block, by SLURM_CONF; give its folder."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path must be short
    daemons: list[subprocess.Popen[bytes]] = []
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(configure(folder, num_nodes, remember_s))

    def start(*command: str) -> None:
        with open(folder / "daemons.log", "ab") as log:
            daemons.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    try:
        files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed", "key-file": "key"}
        options = (f"--{name}={folder}/munge.{ending}" for name, ending in files.items())
        start("munged", "--foreground", "--force", *options)
        wait_until(lambda: (folder / "munge.socket").exists(), 20)
        start("slurmctld", "-D")
        for number in range(num_nodes):
            start("slurmd", "-D", "-N", f"n{number}")
        wait_until(lambda: slurm("sinfo", "--noheader", "--Node", "--format=%T").split() == ["idle"] * num_nodes, 60)
        yield folder
    finally:
        try:
            for job in slurm("squeue", "--noheader", "--format=%A").split():
                slurm("scancel", job)
            wait_until(lambda: not slurm("squeue", "--noheader", "--format=%A").split(), 60)
        finally:
            for daemon in reversed(daemons):
                daemon.send_signal(signal.SIGTERM)
                daemon.wait()
            os.environ.pop("SLURM_CONF") if before is None else os.environ.update(SLURM_CONF=before)
            shutil.rmtree(folder, ignore_errors=True)


def configure(folder: Path, num_nodes: int, remember_s: int) -> Path:
    """Write slurm.conf and munge's key; give the path of the former."""
    host = socket.gethostname().partition(".")[0]
    text = CONFIGURATION.format(host=host, controller=free_port(), folder=folder, remember_s=remember_s)
    text += "".join(NODE.format(name=f"n{number}", host=host, port=free_port()) for number in range(num_nodes))
    text += "PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n"
    (folder / "state").mkdir()
    folder.chmod(0o755)
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").touch()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    return folder / "slurm.conf"


def slurm(*command: str) -> str:
    """Run one of Slurm's commands and give what it prints; nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def wait_until(happened: Callable[[], object], seconds: float, every_s: float = 0.2) -> None:
    """Wait for something to happen."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every_s)
