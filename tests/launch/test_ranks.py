"""Ranks from whatever launched the process."""

import pytest

from tostlm.errors import UserError
from tostlm.launch import Ranks, ranks_from_environment
from tostlm.launch.ranks import export_rendezvous

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
SLURM_STEP = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "123"}


def test_environments() -> None:
    assert ranks_from_environment({}) is None
    assert ranks_from_environment(TORCHRUN) == Ranks(3, 1, 4)
    assert ranks_from_environment(SLURM_STEP) == Ranks(5, 1, 8)
    assert ranks_from_environment(SLURM_STEP | TORCHRUN) == Ranks(3, 1, 4)


def test_a_batch_script_is_no_rank() -> None:
    """sbatch sets SLURM_PROCID in the script itself, where no step runs yet."""
    assert ranks_from_environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123"}) is None


def test_one_task_may_be_a_shell() -> None:
    """In `srun --pty bash` the GPUs of the node are the launcher's to share out."""
    assert ranks_from_environment({**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None


def test_without_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="export MASTER_ADDR yourself"):
        export_rendezvous(Ranks(1, 1, 8), {**SLURM_STEP, "SLURM_STEP_NODELIST": "node[1-2]"})


def test_nonsense() -> None:
    with pytest.raises(UserError, match="rank 'x'"):
        ranks_from_environment({**TORCHRUN, "RANK": "x"})


def test_two_jobs_on_a_node_meet_at_two_ports() -> None:
    ports = []
    for job in ("123", "124"):
        environment = {**SLURM_STEP, "SLURM_JOB_ID": job, "MASTER_ADDR": "node1"}
        export_rendezvous(Ranks(5, 1, 8), environment)
        ports.append(environment["MASTER_PORT"])
        assert (environment["RANK"], environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("5", "8", "node1")
    assert ports[0] != ports[1]


def test_a_launcher_rendezvous_is_kept() -> None:
    environment = {**TORCHRUN, "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    export_rendezvous(Ranks(3, 1, 4), environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("here", "1")
