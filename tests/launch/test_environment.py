"""The rank that each launcher's environment gives, the rendezvous, and the exit report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tostlm.errors import UserError
from tostlm.launch import EXIT_REPORT, RankInfo, rank_from_environment
from tostlm.launch.environment import export_rendezvous

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM_STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123"}


def test_ranks_of_each_launcher() -> None:
    assert rank_from_environment({}) is None
    assert rank_from_environment(TORCHRUN) == RankInfo(3, 1, 4)
    assert rank_from_environment(SLURM_STEP) == RankInfo(5, 1, 8)
    assert rank_from_environment(SLURM_STEP | TORCHRUN) == RankInfo(3, 1, 4)


def test_a_batch_script_is_not_a_rank() -> None:
    """sbatch sets SLURM_PROCID in the script itself, before any step runs."""
    assert rank_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123"}) is None


def test_a_step_of_one_task_may_be_a_shell() -> None:
    """In `srun --pty bash` the local launcher assigns the node's GPUs."""
    assert rank_from_environment({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_a_step_of_one_task_of_our_job_is_a_rank() -> None:
    assert rank_from_environment(
        {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", EXIT_REPORT: "x"}
    ) == RankInfo(0, 1, 1)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("node[1-2]", "node1"), ("gpu[07-09,12],a1", "gpu07"), ("a,b[1-2]", "a"), ("n[3,1-2]", "n3")],
)
def test_the_rendezvous_is_on_the_first_node(nodes: str, first: str) -> None:
    environment = {**SLURM_STEP, "SLURM_STEP_NODELIST": nodes}
    export_rendezvous(RankInfo(1, 1, 8), environment)
    assert environment["MASTER_ADDR"] == first


def test_only_the_first_failing_rank_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "report"
    for rank, code in ((0, 0), (3, 2), (1, 76)):
        command = [sys.executable, "-c", f"from tostlm.launch import exit_rank; exit_rank({code})"]
        done = subprocess.run(command, env={**os.environ, "RANK": str(rank), EXIT_REPORT: str(file)})
        assert done.returncode == code
    assert file.read_text() == "3 2\n"


def test_a_log_on_a_full_disk_changes_no_exit_code() -> None:
    lines = ["from tostlm.errors import report", "from tostlm.launch import exit_rank"]
    command = [sys.executable, "-c", "; ".join([*lines, "print(1)", "report('2')", "exit_rank(76)"])]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # the print is flushed at the exit
    with Path("/dev/full").open("w") as full:
        assert subprocess.run(command, stdout=full, stderr=full, env=environment).returncode == 76


def test_a_rank_that_is_no_number_is_an_error() -> None:
    with pytest.raises(UserError, match="rank 'x'"):
        rank_from_environment({**TORCHRUN, "RANK": "x"})


def test_two_jobs_on_a_node_use_different_ports() -> None:
    ports = []
    for job in ("123", "124"):
        environment = {**SLURM_STEP, "SLURM_JOB_ID": job, "MASTER_ADDR": "node1"}
        export_rendezvous(RankInfo(5, 1, 8), environment)
        ports.append(environment["MASTER_PORT"])
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("5", "8", "node1")
    assert ports[0] != ports[1]


def test_a_rendezvous_set_by_the_launcher_stays() -> None:
    environment = {**TORCHRUN, "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    export_rendezvous(RankInfo(3, 1, 4), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("here", "1")
