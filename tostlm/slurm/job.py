"""What a Slurm job's batch script runs: it starts the ranks as job steps and decides what follows them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from tostlm.config import RunConfig, batch_plan, load_config
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from tostlm.files import require_writable
from tostlm.launch import EXIT_REPORT
from tostlm.slurm.commands import queued_jobs, requeue_job, run_slurm, submit_script
from tostlm.slurm.history import CANCELLED, ENDED, MESSAGE, SCRIPT, STARTED, JobHistory
from tostlm.slurm.restart_policy import OnStop, decide_restart

ACTIVE_STATES = ("RUNNING", "SIGNALING", "SUSPENDED")
# Rank 0 writes to the job's log, every other rank to a file of its own. exec lets signals reach tostlm itself.
RANK_COMMAND = '[ "$SLURM_PROCID" = 0 ] || exec >>"$TOSTLM_LOG-rank-$SLURM_PROCID.log" 2>&1; exec tostlm "$@"'
NOT_STARTED = (EXIT_USER_ERROR, 126, 127)  # a shell's exit codes for a command that it cannot run or find


class StepExit(NamedTuple):
    """How a job step ended."""

    code: int  # of the first rank that failed, or 0
    rank: int = 0  # that rank
    exclude: Sequence[str] = ()  # nodes that the doctor found unhealthy


def run_job(
    config_file: Path, overrides: Sequence[str], on_stop: OnStop, doctor: bool, ranks_per_node: int | None = None
) -> int:
    """Train until the run is finished or this job has to end, and return the job's exit code.

    Args:
        on_stop: what follows when the job was asked to stop.
        doctor: check the nodes before training.
        ranks_per_node: use as many of the job's nodes as the batch splits over, with this many ranks on each; None:
            one rank per task that the job was submitted with.

    Raises:
        UserError: this process runs in no job, the config is wrong, the run's folder cannot be written, or Slurm
            refuses to restart the job.
    """
    job = SlurmJob(load_config(config_file, overrides))
    history = job.history
    require_writable(history.logs)
    steps = JobSteps(history, job.id, job.srun_layout(ranks_per_node))
    if job.is_over():
        return 0
    log = str(Path("/proc/self/fd/1").readlink())
    history.add(STARTED, job.id, step=history.step(), nodes=os.environ["SLURM_JOB_NODELIST"], log=log)
    if on_stop is OnStop.SUCCESSOR and not job.pending_jobs():
        job.submit_successor()
    arguments = [str(config_file), *overrides]
    result = steps.run_doctor(arguments) if doctor else StepExit(0)
    if result.code == 0:
        result = steps.run("train", *arguments)
    facts = {"exit_code": result.code, "rank": result.rank, "exclude": list(result.exclude)}
    history.add(ENDED, job.id, step=history.step(), **facts)
    return job.follow_up(result, on_stop)


class SlurmJob:
    """The job that this process runs in, and the run that it trains."""

    def __init__(self, config: RunConfig) -> None:
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(
                "this is not a Slurm job; submit one: `tostlm submit pretrain`, or sbatch slurm/pretrain.sbatch"
            )
        self.id = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            self.id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        self.history, self._config = JobHistory(config.run_dir), config

    def srun_layout(self, ranks_per_node: int | None) -> list[str]:
        """Return srun's options for nodes and tasks: the most nodes that the batch splits over."""
        if ranks_per_node is None:
            return []
        allocated = int(os.environ["SLURM_NNODES"])
        for nodes in range(allocated, 0, -1):
            with suppress(UserError):
                batch_plan(self._config, nodes * ranks_per_node)
                break
        if nodes < allocated:
            self._report(f"uses {nodes} of its {allocated} nodes: train.batch_tokens splits over no more of them")
        tasks = nodes * ranks_per_node
        return [f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={ranks_per_node}"]

    def is_over(self) -> bool:
        """Return whether there is nothing left to train; report why, and cancel the jobs that wait for this one."""
        run_dir, step = self.history.run_dir, self.history.step()
        if self._is_cancelled():
            self._report("was cancelled and does not start")
        elif step >= self._config.train.steps:
            self._report(f"does not start: {run_dir} is finished at step {step}; raise train.steps to train further")
        else:
            return False
        self._cancel_pending()
        return True

    def follow_up(self, result: StepExit, on_stop: OnStop) -> int:
        """Requeue this job, leave the run to the next job or end the run; return this job's exit code."""
        decision = decide_restart(self.history.start_results(self.id))
        state = next((found.state for found in queued_jobs([self.id])), "gone")
        if self._is_cancelled():
            self._cancel_pending()
            self._report("was cancelled and is not started again")
            return 0
        if state not in ACTIVE_STATES:  # to requeue a job that scancel is ending would undo the scancel
            self._report(f"is {state.lower()}: Slurm ended it, and only Slurm may start it again")
            return 0
        if not decision.restart:
            self._cancel_pending()
            self._report("has finished its run" if result.code == 0 else f"is not started again: {decision.reason}")
            return result.code
        pending = self.pending_jobs()
        if on_stop is not OnStop.REQUEUE and (pending or result.code == EXIT_REQUEUE):
            next_job = f" as job {pending[0]}" if pending else ""
            self._report(f"ends: {decision.reason}{next_job}")
            return 0
        later = f" in {decision.delay_seconds:.0f} s" if decision.delay_seconds else ""
        without = f" without {', '.join(result.exclude)}" if result.exclude else ""
        self._report(f"is started again{later}{without}: {decision.reason}")
        requeue_job(self.id, decision.delay_seconds, result.exclude)
        if self._is_cancelled():  # while it was being requeued
            run_slurm("scancel", self.id)
        return 0

    def pending_jobs(self) -> list[str]:
        """Return the run's other jobs that are pending."""
        found = queued_jobs(self.history.jobs())
        return [other.job for other in found if other.job != self.id and other.state == "PENDING"]

    def submit_successor(self) -> None:
        """Submit the job that starts when this one ends."""
        script = self.history.folder / SCRIPT
        if not script.exists():
            raise UserError(f"{script} is missing, which a successor runs; use `tostlm submit pretrain --until-done`")
        submit_script(self.history, SCRIPT, "--dependency=singleton", after=self.id)

    def _is_cancelled(self) -> bool:
        return any(event["event"] == CANCELLED for event in self.history.events(self.id))

    def _cancel_pending(self) -> None:
        if pending := self.pending_jobs():
            run_slurm("scancel", *pending)
            self._report(f"cancelled the jobs that waited for it: {', '.join(pending)}")

    def _report(self, what: str) -> None:
        """Print and record what this job did, a sentence without its subject."""
        line = f"job {self.id} {what}"
        print(f"tostlm: {line}", flush=True)
        self.history.add(MESSAGE, self.id, text=line)


class JobSteps:
    """The steps of a job: tostlm as one Slurm task per rank. Requests to stop are forwarded to the ranks as SIGUSR1."""

    def __init__(self, history: JobHistory, job: str, srun_layout: Sequence[str]) -> None:
        self._history, self._job, self._srun_layout = history, job, srun_layout
        self._stop_requested = False
        self._running: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._forward_stop)

    def _forward_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_requested = True
        if self._running is not None:
            self._running.send_signal(signal.SIGUSR1)

    def run_doctor(self, arguments: Sequence[str]) -> StepExit:
        """Run `tostlm doctor ARGUMENTS` on all ranks.

        Unhealthy nodes count as a lost rank, so that the job starts again without them; other failures are the user's.
        """
        file = self._history.folder / f"doctor-{self._job}.json"
        file.unlink(missing_ok=True)
        result = self.run("doctor", *arguments, "--out", str(file))
        if result.code != EXIT_USER_ERROR:
            return result
        if not file.exists():  # the ranks never reached rank 0
            return StepExit(EXIT_LOST_RANK, result.rank)
        exclude = [host for host in json.loads(file.read_text())["exclude"] if host]
        return StepExit(EXIT_LOST_RANK if exclude else EXIT_USER_ERROR, result.rank, exclude)

    def run(self, *arguments: str) -> StepExit:
        """Run `tostlm ARGUMENTS` on all ranks."""
        if self._stop_requested:
            return StepExit(EXIT_REQUEUE)
        report = (self._history.folder / f"exit-{self._job}").absolute()
        report.unlink(missing_ok=True)
        log = (self._history.logs / self._job).absolute()
        environment = {**os.environ, EXIT_REPORT: str(report), "TOSTLM_LOG": str(log)}
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from sbatch by itself
            environment = {"OMP_NUM_THREADS": cores, **environment, "SRUN_CPUS_PER_TASK": cores}
        options = ["--kill-on-bad-exit=1", *self._srun_layout, *shlex.split(os.environ.get("TOSTLM_SRUN", ""))]
        command = ["srun", *options, "bash", "-c", RANK_COMMAND, "tostlm", *arguments]
        self._running = subprocess.Popen(command, env=environment)
        code = self._running.wait()
        list(report.parent.iterdir())  # makes a network file system notice a file that another host has made
        with suppress(FileNotFoundError, ValueError):
            rank, code = map(int, report.read_text().split())
            report.unlink()
            return StepExit(code, rank)
        if code == 0:
            return StepExit(0)
        # No rank could report how it ended: all were killed, or srun could not start them.
        if code in NOT_STARTED:
            return StepExit(EXIT_USER_ERROR)
        return StepExit(EXIT_REQUEUE if self._stop_requested else EXIT_LOST_RANK)
