"""From a config to a queued job: everything that can be wrong is found before."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import tostlm
from tostlm.config import RunConfig, batch_plan, dump_config, load_config
from tostlm.data import common_tokenizer
from tostlm.doctor.plan import memory_bytes
from tostlm.errors import UserError
from tostlm.files import locked, require_writable, write_atomically
from tostlm.slurm.commands import queued, submit_after, submit_script
from tostlm.slurm.history import CODE, CONFIG, SCRIPT, SITE, SUBMITTED, JobHistory
from tostlm.slurm.job import OnStop
from tostlm.slurm.script import Resources, batch_script

GIB = 1 << 30


class RestartPolicy(NamedTuple):
    """How a pretraining job goes on, and what it does first."""

    chain: int = 1  # jobs in a row
    until_done: bool = False
    doctor: bool = False
    warning_seconds: int = 120  # before its time limit a job is asked to stop

    @property
    def then(self) -> OnStop:
        if self.until_done:
            return OnStop.SUCCESSOR
        return OnStop.END if self.chain > 1 else OnStop.REQUEUE


def pretrain(
    config_file: Path,
    overrides: Sequence[str],
    resources: Resources,
    course: RestartPolicy,
    sweep: Sequence[str] = (),
    site: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Submit a run, or as an array the runs of a sweep; returns what to tell the user.

    Raises:
        UserError: the config does not fit its ranks, data or memory, the run is queued or running already, its folder
            cannot be written, or Slurm refuses the job. Nothing is queued then.
    """
    run = load_config(config_file, overrides)
    if sweep and (course.chain > 1 or course.until_done):
        raise UserError("--sweep makes one array; its jobs go on by themselves, without --chain and --until-done")
    points = _points(config_file, overrides, run.run_dir, sweep) if sweep else [run]
    memory_gib = gpu_memory_gib(site)
    for point in points:
        check(point, resources, memory_gib)
    record = JobHistory(run.run_dir)
    if not sweep and record.step() >= run.train.steps:
        return f"{run.run_dir}: finished at step {record.step()}; raise train.steps to go on"
    script = _script(run, points, resources, course, site)
    if dry_run:
        return script.rstrip()
    require_writable(record.logs)
    with locked(record.folder / ".lock", f"{run.run_dir} is being submitted by another tostlm submit"):
        for folder in {record.run_dir, *(point.run_dir for point in points)}:
            require_idle(folder)
        for point in points:
            folder = JobHistory(point.run_dir).folder
            require_writable(folder)
            write_atomically(folder / CONFIG, dump_config(point))
        own_site = keep(record, {SCRIPT: script}, site)
        jobs = [submit_script(record.folder / SCRIPT, own_site)]
        record.add(SUBMITTED, jobs[0], runs=[str(point.run_dir.absolute()) for point in points if sweep])
        for index, point in enumerate(points if sweep else ()):
            JobHistory(point.run_dir).add(SUBMITTED, f"{jobs[0]}_{index}")
        for _ in range(course.chain - 1):
            jobs.append(submit_after(jobs, record.folder / SCRIPT, own_site, "--dependency=singleton"))
            record.add(SUBMITTED, jobs[-1], after=jobs[-2])
    return _told(run.run_dir, jobs, course, len(points) if sweep else 0)


def check(config: RunConfig, resources: Resources, memory_gib: float | None) -> None:
    """Hold a config against what its job will have.

    Raises:
        UserError: the ranks of some allowed number of nodes cannot share its batch, its data are not prepared or do
            not fit the model, or the model does not fit a GPU.
    """
    for nodes in resources.fewest_and_most_nodes():
        world_size = nodes * resources.ranks_per_node
        batch_plan(config, world_size)
        _fits(config, world_size, memory_gib)
    common_tokenizer(config.data.folders, config.model.vocab_size)


def gpu_memory_gib(site: Path | None) -> float | None:
    """TOSTLM_GPU_MEMORY_GIB as the environment, or else the site's settings, have it.

    Raises:
        UserError: it is no number.
    """
    told = os.environ.get("TOSTLM_GPU_MEMORY_GIB", "")
    if not told and site is not None:
        read = ["bash", "-c", '. "$0" >&2; printf %s "${TOSTLM_GPU_MEMORY_GIB-}"', str(site)]
        told = subprocess.run(read, capture_output=True, text=True).stdout
    try:
        return float(told) if told else None
    except ValueError:
        raise UserError(f"TOSTLM_GPU_MEMORY_GIB={told} must be a number of GiB, as 80") from None


def _fits(config: RunConfig, world_size: int, memory_gib: float | None) -> None:
    need = memory_bytes(config, world_size) / GIB
    if memory_gib is not None and need > memory_gib:
        raise UserError(
            f"model and optimizer take {need:.3g} GiB a rank on {world_size} ranks, above TOSTLM_GPU_MEMORY_GIB="
            f"{memory_gib:g}; raise deepspeed.zero_optimization.stage, ask for more GPUs or offload the optimizer"
        )


def require_idle(run_dir: Path) -> None:
    """Refuse a run that is under way.

    Raises:
        UserError: one of its jobs waits or runs, or somebody trains in its folder without Slurm.
    """
    if alive := queued(JobHistory(run_dir).jobs()):
        raise UserError(
            f"{run_dir} is under way as job {alive[0].job} ({alive[0].state}); see `tostlm submit status {run_dir}`, "
            f"or end it first: `tostlm submit cancel {run_dir}`"
        )
    if run_dir.is_dir():
        with locked(run_dir / ".lock", f"{run_dir} is in use by another tostlm train; wait for it or end it"):
            pass


def _points(config_file: Path, overrides: Sequence[str], run_dir: Path, sweep: Sequence[str]) -> list[RunConfig]:
    """The configs of all combinations of a sweep's values, each with a folder of its own in `run_dir`."""
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {axis} must be a key and its values, as in optimizer.lr=1e-3,3e-4")
        axes.append([f"{key}={value}" for value in values.split(",")])
    points = list(itertools.product(*axes))
    return [load_config(config_file, [*overrides, *point, f"run_dir={run_dir / ','.join(point)}"]) for point in points]


def _script(
    run: RunConfig, points: Sequence[RunConfig], resources: Resources, course: RestartPolicy, site: Path | None
) -> str:
    record = JobHistory(run.run_dir.absolute())
    configs = [JobHistory(point.run_dir.absolute()).folder / CONFIG for point in points]
    array = points[0].run_dir != run.run_dir
    options = [
        f"--job-name={job_name(run.run_dir)}",
        *resources.options(),
        f"--signal=B:USR1@{course.warning_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={record.logs}/{'%A_%a' if array else '%j'}.log",
        f"--chdir={Path.cwd()}",
        *([f"--array=0-{len(configs) - 1}"] if array else []),
    ]
    job = ["tostlm submit job"]
    if array:
        listed = "\n".join(f"    {shlex.quote(str(config))}" for config in configs)
        before = [f"configs=(\n{listed}\n)"]
        job.append('"${configs[$SLURM_ARRAY_TASK_ID]}"')
    else:
        before = []
        job.append(shlex.quote(str(configs[0])))
    job += [f"--ranks-per-node {resources.ranks_per_node}"] * resources.ranged
    job += [f"--then {course.then}"] * (course.then is not OnStop.REQUEUE) + ["--doctor"] * course.doctor
    own_site = record.folder / SITE if site else None
    return batch_script("tostlm submit pretrain", options, own_site, [*resources.settings(), *before, " ".join(job)])


def job_name(run_dir: Path) -> str:
    """Of all of a run's jobs, and of no other's: what Slurm's singleton dependency goes by."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:6]}"


def keep(record: JobHistory, scripts: Mapping[str, str], site: Path | None) -> Path | None:
    """Write down what is about to be submitted: scripts, the site's settings, the code; returns the settings' copy."""
    for name, script in scripts.items():
        write_atomically(record.folder / name, script)
    write_atomically(record.folder / CODE, code_version())
    if site is None:
        (record.folder / SITE).unlink(missing_ok=True)
        return None
    with suppress(shutil.SameFileError):
        shutil.copyfile(site, record.folder / SITE)
    return record.folder / SITE


def code_version() -> str:
    """The version of this code, its git commit and what was changed since, and all installed packages."""
    folder = Path(tostlm.__file__).parent
    lines = [f"tostlm {tostlm.__version__} in {folder}"]
    for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]):
        try:
            done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            break
        if done.returncode:  # no checkout
            break
        lines += [f"\n# git {' '.join(command)}", done.stdout.rstrip()]
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    return "\n".join([*lines, "\n# packages", *sorted(packages, key=str.lower)]) + "\n"


def _told(run_dir: Path, jobs: Sequence[str], course: RestartPolicy, runs: int) -> str:
    if runs:
        follows = f"an array of {runs} runs, each in a folder of {run_dir}; each is started again until it is finished"
    elif course.until_done:
        follows = "it queues its successor when it starts, until the run is finished"
    elif len(jobs) > 1:
        follows = f"after it, one after another: {', '.join(jobs[1:])}"
    else:
        follows = "it is started again after its time limit, a preemption or a lost node until the run is finished"
    return f"job {jobs[0]}: {follows}\nsee `tostlm submit status {run_dir}`"
