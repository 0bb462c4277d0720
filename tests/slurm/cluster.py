"""A real Slurm of one node on this machine, on loopback, with state of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurm-wlm-basic-plugins"]
CONFIG = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
KillWait=2
ReturnToService=2
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node_port} CPUs=8 RealMemory=16000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=2-00:00:00 State=UP
"""


def install() -> str | None:
    """Install Slurm where it is missing; returns why it cannot be."""
    if shutil.which("slurmctld", path=_path()):
        return None
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return f"Slurm is not installed; apt-get install {' '.join(PACKAGES)}"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: no daemon is started
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", "-qq", *command], capture_output=True, text=True, env=environment)
        if done.returncode:
            return f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start a controller and a node; gives the environment for Slurm's commands, and ends both."""
    (folder / "state").mkdir(parents=True)
    (folder / "spool").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    ports = dict(zip(("controller_port", "node_port"), _free_ports(2), strict=True))
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    config.write_text(CONFIG.format(host=socket.gethostname().split(".")[0], user=user, folder=folder, **ports))
    environment = {**os.environ, "SLURM_CONF": str(config), "PATH": _path()}
    names = ("log-file", "pid-file", "seed-file")
    munge = [f"--socket={folder}/munge.sock", f"--key-file={key}", *(f"--{n}={folder}/munge.{n}" for n in names)]
    started = []
    try:
        for command in (
            ["munged", "--foreground", "--force", *munge],
            ["slurmctld", "-D", "-c", "-i"],
            ["slurmd", "-D", "-N", "node1"],
        ):
            with (folder / f"{command[0]}.out").open("w") as log:
                process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            started.append(process)
            if command[0] == "munged":
                _wait(lambda: (folder / "munge.sock").exists(), folder)
        _wait(lambda: _ask(environment, "sinfo", "-h", "-o", "%t") == "idle", folder)
        yield environment
    finally:
        if len(started) == 3:
            _ask(environment, "scancel", f"--user={user}")
            _wait(lambda: not _ask(environment, "squeue", "-h") and not _steps(folder), folder)
        for process in reversed(started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=30)


def _steps(folder: Path) -> list[str]:
    """The step daemons of this cluster that have not ended; they outlive slurmd."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"slurmstepd" in (process / "cmdline").read_bytes()
                and f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes()
            ):
                found.append(process.name)
        except OSError:  # it has just ended, or is another user's
            continue
    return found


def _wait(ready: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        if time.monotonic() > deadline:
            raise RuntimeError("\n".join(path.read_text() for path in folder.glob("*.out")))
        time.sleep(0.1)


def _ask(environment: dict[str, str], *command: str) -> str:
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=5).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
