"""What a Slurm job's batch script becomes: it starts the ranks, and sees to what comes after."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from tostlm.config import RunConfig, batch_plan, load_config
from tostlm.errors import EXIT_REQUEUE, UserError
from tostlm.files import require_writable
from tostlm.slurm.commands import queued, requeue, slurm, submit_script
from tostlm.slurm.history import CANCELLED, ENDED, SAID, SCRIPT, SITE, STARTED, SUBMITTED, JobHistory
from tostlm.slurm.policy import decide
from tostlm.slurm.step import StepExit, Steps

UNDER_WAY = ("RUNNING", "SIGNALING", "SUSPENDED")


class OnStop(StrEnum):
    """What follows a job that was asked to stop, as Slurm does before the time limit."""

    REQUEUE = "requeue"  # the same job, again
    END = "end"  # those that wait for it
    SUCCESSOR = "successor"  # the job that it has queued when it started


def run_job(
    config_file: Path, overrides: Sequence[str], then: OnStop, doctor: bool, ranks_per_node: int | None = None
) -> int:
    """Train until the run is finished or its job has to end; returns the job's exit code.

    With `ranks_per_node` it takes as many of its nodes as the batch splits over, else the tasks it was submitted with.

    Raises:
        UserError: this is no job, its config is wrong, its folder cannot be written, or Slurm refuses to go on.
    """
    job = Job(load_config(config_file, overrides))
    require_writable(job.record.logs)
    steps = Steps(job.record, job.id, job.layout(ranks_per_node))
    if job.is_over():
        return 0
    job.start()
    if then is OnStop.SUCCESSOR and not job.waiting():
        job.queue_successor()
    arguments = [str(config_file), *overrides]
    ended = steps.examine(arguments) if doctor else StepExit(0)
    if ended.code == 0:
        ended = steps.train(arguments)
    job.end(ended)
    return job.go_on(ended, then)


class Job:
    """This process's job and the run that it is for.

    Raises:
        UserError: this process runs in no job.
    """

    def __init__(self, config: RunConfig) -> None:
        if "SLURM_JOB_ID" not in os.environ:
            raise UserError(
                "this is no Slurm job; submit one: `tostlm submit pretrain`, or sbatch slurm/pretrain.sbatch"
            )
        self.id = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            self.id = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        self.record, self._config = JobHistory(config.run_dir), config

    def layout(self, ranks_per_node: int | None) -> list[str]:
        """What srun is to be told of nodes and tasks."""
        if ranks_per_node is None:
            return []
        given = int(os.environ["SLURM_NNODES"])
        for nodes in range(given, 0, -1):
            with suppress(UserError):
                batch_plan(self._config, nodes * ranks_per_node)
                break
        if nodes < given:
            self._say(
                f"job {self.id} uses {nodes} of its {given} nodes: train.batch_tokens splits over no more of them"
            )
        tasks = nodes * ranks_per_node
        return [f"--nodes={nodes}", f"--ntasks={tasks}", f"--ntasks-per-node={ranks_per_node}"]

    def is_over(self) -> bool:
        """Whether there is nothing left to do, which is said then; what waits for the job is cancelled."""
        step = self.record.step()
        if self._cancelled():
            self._say(f"job {self.id} was cancelled and does not start")
        elif step >= self._config.train.steps:
            self._say(f"{self._config.run_dir}: finished at step {step}; raise train.steps to go on")
        else:
            return False
        self._cancel_waiting()
        return True

    def start(self) -> None:
        """Write down that the job has started."""
        log = str(Path("/proc/self/fd/1").readlink())
        self.record.add(STARTED, self.id, step=self.record.step(), nodes=os.environ["SLURM_JOB_NODELIST"], log=log)

    def end(self, ended: StepExit) -> None:
        """Write down how this start of the job ended."""
        facts = {"code": ended.code, "rank": ended.rank, "exclude": list(ended.exclude)}
        self.record.add(ENDED, self.id, step=self.record.step(), **facts)

    def go_on(self, ended: StepExit, then: OnStop) -> int:
        """See to what comes after this start; returns the job's exit code."""
        decision = decide(self.record.ends(self.id))
        state = next((found.state for found in queued([self.id])), "gone")
        if self._cancelled():
            self._cancel_waiting()
            self._say(f"job {self.id} was cancelled and is not started again")
            return 0
        if state not in UNDER_WAY:  # to requeue a job that scancel is ending would undo that
            self._say(f"job {self.id} is {state.lower()}: Slurm ended it, and alone may start it again")
            return 0
        if not decision.again:
            self._cancel_waiting()
            over = "has finished its run" if ended.code == 0 else f"is not started again: {decision.why}"
            self._say(f"job {self.id} {over}")
            return ended.code
        waiting = self.waiting()
        if then is not OnStop.REQUEUE and (waiting or ended.code == EXIT_REQUEUE):
            self._say(f"job {self.id} ends: {decision.why}" + "".join(f" as job {other}" for other in waiting[:1]))
            return 0
        later = f" in {decision.delay_seconds:.0f} s" if decision.delay_seconds else ""
        without = f" without {', '.join(ended.exclude)}" if ended.exclude else ""
        self._say(f"job {self.id} is started again{later}{without}: {decision.why}")
        requeue(self.id, decision.delay_seconds, ended.exclude)
        if self._cancelled():  # in the meantime
            slurm("scancel", self.id)
        return 0

    def waiting(self) -> list[str]:
        """The run's jobs that come after this one."""
        found = queued(self.record.jobs())
        return [other.job for other in found if other.job != self.id and other.state == "PENDING"]

    def queue_successor(self) -> None:
        """Queue the job that starts when this one ends."""
        script, site = self.record.folder / SCRIPT, self.record.folder / SITE
        if not script.exists():
            raise UserError(f"{script} is missing, which a successor runs; use `tostlm submit pretrain --until-done`")
        successor = submit_script(script, site if site.exists() else None, "--dependency=singleton")
        self.record.add(SUBMITTED, successor, after=self.id)

    def _cancelled(self) -> bool:
        return any(event["what"] == CANCELLED for event in self.record.events(self.id))

    def _cancel_waiting(self) -> None:
        if waiting := self.waiting():
            slurm("scancel", *waiting)
            self._say(f"cancelled what waited for it: job {', '.join(waiting)}")

    def _say(self, line: str) -> None:
        print(f"tostlm: {line}", flush=True)
        self.record.add(SAID, self.id, text=line)
