"""A Slurm cluster for the tests, and runs that are its jobs."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, succeed
from tests.slurm.cluster import Cluster, unavailable_reason, wait_until
from tests.warm import Program

NODES = 3


@pytest.fixture(scope="session")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := unavailable_reason():
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), NODES)
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(machines: Cluster) -> Iterator[Cluster]:
    """All nodes up and idle. Afterwards the jobs that a test has left are cancelled."""
    yield machines
    machines.ask("scancel", "--user=root")
    for node in machines.down():
        machines.boot(node)
    wait_until(
        lambda: not machines.ask("squeue", "-h") and machines.idle_nodes() == NODES,
        lambda: machines.ask("squeue") + machines.ask("sinfo"),
    )


class ClusterJob:
    """A run on the cluster, and what its folder holds about its jobs."""

    def __init__(self, cluster: Cluster, run: Run) -> None:
        self.cluster, self.run = cluster, run
        self.folder = run.dir / "slurm"
        self.id = ""

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `tostlm ARGUMENTS` on the login node."""
        path = {key: self.cluster.environment[key] for key in ("PATH", "SLURM_CONF")}
        return Program(*arguments, cwd=self.run.file.parent, **path).end()

    def submit(self, *arguments: str) -> str:
        printed = succeed(self.command("submit", "pretrain", str(self.run.file), *arguments))
        found = re.match(r"job (\d+):", printed)
        assert found is not None, printed
        self.id = found[1]
        return printed

    def wait_for(self, happened: Callable[[], object], seconds: float = 120) -> float:
        return wait_until(happened, self.details, seconds)

    def details(self) -> str:
        texts = [path.read_text()[-3000:] for path in sorted(self.folder.rglob("*.log"))]
        return "\n".join([self.cluster.ask("squeue"), *map(str, self.events()), *texts])

    def steps(self) -> int:
        """Return how many steps training has logged."""
        return len(self.run.metrics("train")) if (self.run.dir / "metrics.jsonl").exists() else 0

    def log(self, job: str | None = None) -> str:
        file = self.folder / "logs" / f"{job or self.id}.log"
        return file.read_text() if file.exists() else ""

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        file = self.folder / "jobs.jsonl"
        events = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [event for event in events if kind in (None, event["event"])]

    def states(self) -> list[str]:
        return self.cluster.ask("squeue", "-h", "-o", "%T").split()

    def gone(self) -> bool:
        return not self.states()

    def rank(self, number: int) -> int:
        """Return the process of a rank by its id in this machine's namespace."""
        wanted = {f"SLURM_JOB_ID={self.id}".encode(), f"SLURM_PROCID={number}".encode()}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if b"\0train\0" in (process / "cmdline").read_bytes() and wanted <= set(
                    (process / "environ").read_bytes().split(b"\0")
                ):
                    return int(process.name)
            except OSError:  # it has just ended
                continue
        raise AssertionError(f"rank {number} does not run\n{self.details()}")


@pytest.fixture
def job(cluster: Cluster, run: Run) -> ClusterJob:
    return ClusterJob(cluster, run)


def site_with_wrapper(folder: Path, text: str) -> Path:
    """Return a site.env with which `tostlm` on the nodes runs a bash script first, which can break something there."""
    real = Path(sys.executable).parent / "tostlm"
    (folder / "bin").mkdir()
    wrapper = folder / "bin" / "tostlm"
    wrapper.write_text(f'#!/usr/bin/env bash\n{text}\nexec {real} "$@"\n')
    wrapper.chmod(0o755)
    site = folder / "site.env"
    site.write_text(f'export PATH="{folder}/bin:$PATH"\n')
    return site
