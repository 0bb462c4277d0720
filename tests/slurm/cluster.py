"""A real Slurm on this machine: a controller and nodes, each with its own address, hostname and processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from signal import SIGKILL

from tests.apt import PATH, missing_reason
from tostlm.launch.local import end_with_parent

PACKAGES = ["slurmctld", "slurmd", "slurm-client", "munge", "slurm-wlm-basic-plugins", "iproute2", "shellcheck"]
COMMANDS = ["sbatch", "squeue", "scontrol", "scancel", "sinfo", "srun"]
SLURMD_PORT = 6818
GPUS = 2  # generic resources that each node claims, without devices
CONFIG = """\
ClusterName=tests
SlurmctldHost=head(10.77.0.1)
SlurmUser=root
SlurmdPort={port}
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SlurmdTimeout=10
MessageTimeout=5
KillWait=5
MinJobAge=600
ReturnToService=2
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
PartitionName=main Nodes=ALL Default=YES PriorityTier=100 PreemptMode=OFF MaxTime=2-00:00:00 State=UP
PartitionName=spare Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=2-00:00:00 State=UP
"""


def unavailable_reason() -> str | None:
    """Return why the cluster cannot run here, or None. See `missing_reason` for what is installed."""
    if os.geteuid() != 0:
        return "the Slurm cluster of the tests takes root; run them as root to enable"
    if reason := missing_reason(("slurmctld", "ip", "shellcheck"), PACKAGES):
        return reason
    if subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        return "no namespaces can be made here; allow unshare(2) to enable the tests on Slurm"
    return None


def wait_until(happened: Callable[[], object], details: Callable[[], str], seconds: float = 120) -> float:
    """Wait for a condition and return the seconds it took; on a timeout fail with `details`."""
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < seconds, details()
        time.sleep(0.05)
    return time.monotonic() - start


class Cluster:
    """A controller and nodes node1, node2, ...; `environment` is that of a login node."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, start = folder, time.monotonic()
        for name in ("state", "spool", "bin", "gpu"):
            (folder / name).mkdir(parents=True)
        self._write_configuration([f"node{number + 1}" for number in range(nodes)])
        python = Path(sys.executable).parent
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder}/bin:{python}:{PATH}",
            "OMP_NUM_THREADS": "1",
        }
        self._machines: dict[str, subprocess.Popen[bytes]] = {}
        self._head = self._unshare("head", [], "head.sh", str(folder))
        self._write_commands()
        self._wait((folder / "head.up").exists)
        for number in range(nodes):
            self.boot(f"node{number + 1}")
        self._wait(lambda: self.idle_nodes() == nodes)
        self.start_seconds = time.monotonic() - start

    def _write_configuration(self, nodes: list[str]) -> None:
        for gpu in range(GPUS):
            (self.folder / f"gpu/gpu{gpu}").symlink_to("/dev/null")
        (self.folder / "munge.key").write_bytes(os.urandom(128))
        (self.folder / "munge.key").chmod(0o600)
        self.folder.chmod(0o755)
        self._addresses = {name: f"10.77.0.{11 + number}" for number, name in enumerate(nodes)}
        machines = [
            f"NodeName={name} NodeAddr={address} CPUs=8 RealMemory=16000 Gres=gpu:{GPUS} State=UNKNOWN"
            for name, address in self._addresses.items()
        ]
        slurm = CONFIG.format(folder=self.folder, port=SLURMD_PORT) + "\n".join(machines) + "\n"
        (self.folder / "slurm.conf").write_text(slurm)
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu/gpu[0-{GPUS - 1}]\n")
        hosts = {"localhost": "127.0.0.1", "head": "10.77.0.1", **self._addresses}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))

    def _unshare(self, name: str, inside: list[str], script: str, *arguments: str) -> subprocess.Popen[bytes]:
        spaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
        command = [*inside, *spaces, "bash", str(Path(__file__).parent / script), *arguments]
        with (self.folder / f"{name}.out").open("ab") as log:
            machine = subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(end_with_parent, SIGKILL),
            )
        self._machines[name] = machine
        return machine

    def _write_commands(self) -> None:
        """Write wrappers that run Slurm's commands in the controller's network namespace."""
        for name in COMMANDS:
            command = self.folder / "bin" / name
            command.write_text(
                f'#!/bin/sh\nexec nsenter --target {self._head.pid} --net --uts {shutil.which(name)} "$@"\n'
            )
            command.chmod(0o755)

    def boot(self, node: str) -> None:
        """Power a node on."""
        inside = ["nsenter", f"--target={self._head.pid}", "--net", "--mount"]
        machine = self._unshare(node, inside, "node.sh", node, self._addresses[node])
        heads = Path(f"/proc/{self._head.pid}/ns/net").readlink()
        own, here = Path(f"/proc/{machine.pid}/ns/net"), Path("/proc/self/ns/net").readlink()
        self._wait(lambda: own.readlink() not in (heads, here))
        cable = f"cable-{node}"
        for command in (
            ["link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(machine.pid)],
            ["link", "set", cable, "master", "cluster", "up"],
        ):
            subprocess.run(["nsenter", f"--target={self._head.pid}", "--net", "ip", *command], check=True)
        # A node that comes back soon is idle for the controller before its slurmd answers.
        call = ["nsenter", f"--target={self._head.pid}", "--net", "bash", "-c"]
        answers = [*call, f": </dev/tcp/{self._addresses[node]}/{SLURMD_PORT}"]
        self._wait(lambda: subprocess.run(answers, capture_output=True).returncode == 0)

    def crash(self, node: str) -> None:
        """Kill all processes of a node at once."""
        machine = self._machines.pop(node)
        machine.kill()
        machine.wait()

    def process(self, number: int) -> int:
        """Return the id in this machine's namespace of a process on the controller's host."""
        for status in Path("/proc").glob("[0-9]*/status"):
            with suppress(OSError):
                pids = next(line for line in status.read_text().splitlines() if line.startswith("NSpid:")).split()[1:]
                spaces = [Path(f"/proc/{pid}/ns/net").readlink() for pid in (pids[0], self._head.pid)]
                if len(pids) > 1 and int(pids[-1]) == number and spaces[0] == spaces[1]:
                    return int(pids[0])
        raise ProcessLookupError(number)

    def down(self) -> list[str]:
        return [node for node in self._addresses if node not in self._machines]

    def idle_nodes(self) -> int:
        return int(self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") or 0)

    def ask(self, *command: str) -> str:
        """Return what one of Slurm's commands prints; retry while the controller does not answer."""
        for _ in range(10):
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                return done.stdout.strip()
            time.sleep(0.3)
        raise RuntimeError(f"{command}: {done.stderr}")

    def stop(self) -> None:
        for name in reversed(list(self._machines)):
            self.crash(name)

    def _wait(self, ready: Callable[[], object]) -> None:
        wait_until(ready, lambda: "\n".join(path.read_text() for path in self.folder.glob("*.out")), 60)
