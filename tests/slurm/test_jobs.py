"""Jobs that are stopped, preempted, killed, stuck or lose a node continue without losing steps."""

import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import ROOT, Run, succeed
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import ClusterJob, site_with_wrapper
from tostlm.checkpoint import checkpoints, read_train_state
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE

pytestmark = pytest.mark.timed

TWO_NODES = ("--nodes", "2", "--gpus-per-node", "1")


def exit_codes(job: ClusterJob) -> list[int]:
    return [event["exit_code"] for event in job.events("ended")]


def assert_every_step_once(run: Run, steps: int) -> None:
    """Assert that every step was logged exactly once."""
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    assert sum('"kind": "train"' in line for line in lines) == steps
    assert list(run.metrics("train")) == list(range(1, steps + 1))
    events = EventAccumulator(str(run.dir / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, steps + 1))
    assert read_train_state(checkpoints(run.dir)[-1]).step == steps


def test_the_cluster_starts_within_seconds(machines: Cluster) -> None:
    assert machines.start_seconds < 10


def test_sbatch_by_hand_on_two_nodes(cluster: Cluster, tmp_path: Path, data: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [f"run_dir={run_dir}", f"data.path={data}", "train.steps=3", "optimizer.warmup_steps=1"]
    overrides += ["train.eval_tokens=1024"]
    script = ["slurm/pretrain.sbatch", "configs/quickstart.yaml", *overrides]
    hardware = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    command = ["sbatch", "--parsable", *hardware, f"--output={tmp_path}/%j.log", *script]
    done = subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    log = tmp_path / f"{done.stdout.strip()}.log"
    wait_until(lambda: not cluster.ask("squeue", "-h"), lambda: log.read_text())
    state = read_train_state(checkpoints(run_dir)[-1])
    assert (state.step, state.world_size) == (3, 2), log.read_text()
    assert "step 3/3" in log.read_text()
    assert (run_dir / "slurm" / "logs" / f"{done.stdout.strip()}-rank-1.log").exists()


def test_preemption_at_a_random_step_keeps_the_losses(job: ClusterJob, data: Path, tmp_path: Path) -> None:
    steps = "train.steps=150"
    (tmp_path / "undisturbed").mkdir()
    undisturbed = Run(tmp_path / "undisturbed", data)
    succeed(undisturbed.train(steps, nproc=2))

    job.submit(steps, "train.save_every_steps=1000", *TWO_NODES, "--partition", "spare")
    step = random.randint(2, 30)
    job.wait_for(lambda: job.steps() >= step)
    preempting = ["srun", "--partition=main", "--nodes=3", "--exclusive", "true"]
    subprocess.run(preempting, env=job.cluster.environment, check=True, capture_output=True, timeout=60)
    job.wait_for(job.gone)
    assert exit_codes(job) == [EXIT_REQUEUE, 0], job.details()
    saved = job.events("ended")[0]["step"]
    assert step <= saved < 150, f"to be preempted at {step}"
    assert f"continues from step {saved}" in job.log()
    assert_every_step_once(job.run, 150)
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("validation", "loss")):
        assert job.run.metrics(kind, key) == undisturbed.metrics(kind, key)


def test_stuck_and_killed_ranks_are_named_and_the_job_restarts(job: ClusterJob) -> None:
    """A job that is asked to stop is requeued within seconds."""
    endless = ("train.steps=100000", "train.save_every_steps=5", "train.keep_last_checkpoints=2")
    job.submit(*endless, "train.hang_timeout_seconds=10", *TWO_NODES)
    job.wait_for(lambda: job.steps() > 5)
    stopped = time.time()
    os.kill(job.rank(1), signal.SIGSTOP)
    job.wait_for(lambda: len(exit_codes(job)) == 1)
    assert job.events("ended")[-1]["time"] - stopped < 10 + 10  # and the time Slurm takes to end the others
    assert "rank 1 on node2" in job.log() and "made no progress since" in job.log()

    before = job.steps()
    job.wait_for(lambda: "RUNNING" in job.states() and len(job.events("started")) == 2 and job.steps() > before + 5)
    killed = time.time()
    os.kill(job.rank(1), signal.SIGKILL)
    job.wait_for(lambda: len(exit_codes(job)) == 2)
    assert job.events("ended")[-1]["time"] - killed < 10
    assert exit_codes(job) == [EXIT_LOST_RANK, EXIT_LOST_RANK]

    before = job.steps()
    job.wait_for(lambda: len(job.events("started")) == 3 and job.steps() > before + 5)
    asked = time.time()
    job.cluster.ask("scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for(lambda: "RUNNING" not in job.states())
    assert "is started again" in job.events("message")[-1]["text"]
    assert job.events("message")[-1]["time"] - asked < 7  # a step, a save and five seconds
    assert exit_codes(job)[2:] == [EXIT_REQUEUE]
    (end,) = [event for event in job.events("ended") if event["exit_code"] == EXIT_REQUEUE]
    assert end["step"] == max(job.run.metrics("train"))  # no finished step is lost
    job.wait_for(lambda: "PENDING" in job.states() or "RUNNING" in job.states())

    printed = succeed(job.command("submit", "status", str(job.run.dir)))
    assert f"job         {job.id} " in printed and "restarted" in printed
    assert f"checkpoint  {checkpoints(job.run.dir)[-1].parent}/step-" in printed
    job.wait_for(lambda: len(job.events("started")) == 4 and job.states() == ["RUNNING"])
    job.wait_for(lambda: job.steps() > end["step"] + 2)
    assert succeed(job.command("submit", "cancel", str(job.run.dir))) == f"job {job.id} saves and ends\n"
    job.wait_for(job.gone)
    assert "was cancelled and is not started again" in job.log()


@pytest.mark.slow
def test_the_job_restarts_when_a_lost_node_returns(job: ClusterJob) -> None:
    job.submit("train.steps=100000", "train.save_every_steps=5", "train.keep_last_checkpoints=2", *TWO_NODES)
    job.wait_for(lambda: job.steps() > 8)
    job.cluster.crash("node2")
    job.wait_for(lambda: "RUNNING" not in job.states(), 60)
    before, starts = job.steps(), len(job.events("started"))
    job.cluster.boot("node2")
    assert job.wait_for(lambda: len(job.events("started")) > starts and job.steps() != before, 90) < 60


@pytest.mark.slow
def test_a_range_of_nodes_uses_the_nodes_that_are_up(job: ClusterJob) -> None:
    """It uses two of three nodes, over which the batch splits, and one when the others are lost."""
    endless = ("train.steps=100000", "train.save_every_steps=5", "train.keep_last_checkpoints=2")
    job.submit(*endless, "--nodes", "1-4", "--gpus-per-node", "1")
    job.wait_for(lambda: job.steps() > 8)
    assert job.events("started")[0]["nodes"] == "node[1-3]"
    assert "uses 2 of its 3 nodes" in job.log()
    assert read_train_state(checkpoints(job.run.dir)[-1]).world_size == 2
    for node in ("node2", "node3"):
        job.cluster.crash(node)
    job.wait_for(lambda: job.events("started")[-1]["nodes"] == "node1")
    resumed = job.events("started")[-1]["step"]
    assert resumed >= 5
    job.wait_for(lambda: checkpoints(job.run.dir) and read_train_state(checkpoints(job.run.dir)[-1]).world_size == 1)
    assert max(job.run.metrics("train")) > resumed


@pytest.mark.slow
def test_a_bug_is_not_restarted_for_ever(job: ClusterJob, tmp_path: Path) -> None:
    broken = "import tostlm.data as d; d.Loader.batch = lambda *_: 1 / 0; from tostlm.main import main; main()"
    text = f'[ "$1" != train ] || exec python -c "{broken}" "$@"'
    job.submit("--site", str(site_with_wrapper(tmp_path, text)))
    job.wait_for(job.gone)
    assert exit_codes(job) == [1, 1]
    assert "it failed with a bug, and none of its last 2 starts got beyond step 0" in job.log()
    printed = succeed(job.command("submit", "status", str(job.run.dir)))
    assert "ZeroDivisionError" in printed and "with exit code 1" in printed


@pytest.mark.slow
def test_an_unhealthy_node_is_excluded(job: ClusterJob, tmp_path: Path) -> None:
    wrong = "import torch; right = torch.matmul; torch.matmul = lambda a, b: right(a, b) * 1.001"
    main = "from tostlm.main import main; main()"
    text = f'[ "$1 $(hostname)" != "doctor node2" ] || exec python -c "{wrong}; {main}" "$@"'
    site = site_with_wrapper(tmp_path, text)
    job.submit("train.steps=3", "--site", str(site), "--doctor", "--nodes", "1-2", "--gpus-per-node", "1")
    job.wait_for(job.gone)
    assert [event["nodes"] for event in job.events("started")][-2:] == ["node[1-2]", "node[1,3]"]
    assert job.events("ended")[-2]["exclude"] == ["node2"]
    assert "gemm: rank 1 on node2 is unhealthy" in job.log()
    # A node that the controller could not reach at the first start counts as a lost rank, and the next start waits.
    assert re.search(r"is started again( in 10 s)? without node2", job.log())
    assert_every_step_once(job.run, 3)


SHORT = ("train.steps=100000", "train.time_limit_minutes=0.05", "train.save_every_steps=50000")


@pytest.mark.slow
def test_a_chain_continues_across_time_limits(job: ClusterJob) -> None:
    assert "after it, one after another: " in job.submit(*SHORT, "--chain", "2")
    job.wait_for(job.gone)
    first, second = job.events("ended")
    assert first["exit_code"] == second["exit_code"] == EXIT_REQUEUE
    assert 0 < first["step"] < second["step"]
    assert [event["job"] for event in job.events("submitted")] == [first["job"], second["job"]]


@pytest.mark.slow
def test_with_until_done_each_job_queues_the_next(job: ClusterJob) -> None:
    job.submit(*SHORT, "--until-done")
    job.wait_for(lambda: len(job.events("started")) == 2 and len(job.events("submitted")) == 3)
    first, second, third = (event["job"] for event in job.events("submitted"))
    assert [event["job"] for event in job.events("started")] == [first, second]
    assert f"as job {second}" in job.log(first)
    cancelled = succeed(job.command("submit", "cancel", str(job.run.dir), "--now")).splitlines()
    assert sorted(cancelled) == [f"job {second} is cancelled", f"job {third} is cancelled"]
    job.wait_for(job.gone)

    steps = read_train_state(checkpoints(job.run.dir)[-1]).step + 1
    job.submit(f"train.steps={steps}", "--until-done")
    job.wait_for(job.gone)
    assert job.events("ended")[-1]["exit_code"] == 0
    assert f"cancelled the jobs that waited for it: {job.events('submitted')[-1]['job']}" in job.log()


def test_a_job_cancelled_by_scancel_does_not_restart(job: ClusterJob) -> None:
    job.submit("train.steps=100000")
    job.wait_for(lambda: job.steps() > 2)
    job.cluster.ask("scancel", job.id)
    job.wait_for(job.gone)
    time.sleep(1)
    assert job.gone()
    assert len(job.events("started")) == 1


@pytest.mark.slow
def test_a_job_waits_for_a_controller_that_does_not_answer(job: ClusterJob) -> None:
    job.submit("train.steps=200")
    job.wait_for(lambda: job.steps() > 5)
    controller = int((job.cluster.folder / "slurmctld.pid").read_text())
    os.kill(job.cluster.process(controller), signal.SIGSTOP)
    job.wait_for(lambda: exit_codes(job) == [0])
    time.sleep(15)  # some commands have timed out by now
    os.kill(job.cluster.process(controller), signal.SIGCONT)
    job.wait_for(job.gone)
    assert "error" not in job.log()
    assert "has finished its run" in job.log()


@pytest.mark.slow
def test_a_job_saves_before_its_time_limit_and_restarts(job: ClusterJob) -> None:
    job.submit("train.steps=100000", "train.save_every_steps=50000", "--time", "2:00", "--warning-seconds", "30")
    job.wait_for(lambda: len(job.events("started")) == 2, 240)
    assert exit_codes(job) == [EXIT_REQUEUE]
    assert job.events("started")[1]["step"] == job.events("ended")[0]["step"] > 0
    assert "(SIGUSR1)" in job.log()
