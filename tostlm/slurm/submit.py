"""Submission of jobs: pretraining, and single tasks such as evaluation. Every check comes before anything is queued."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import tostlm
from tostlm.accelerators import GIB
from tostlm.checkpoint import resolve, run_folder
from tostlm.checkpoint.branch import find_origin
from tostlm.config import RunConfig, batch_plan, dump_config, load_config
from tostlm.errors import UserError
from tostlm.files import locked, require_writable, write_atomically
from tostlm.formats import is_foreign
from tostlm.plan import require_fit
from tostlm.slurm.commands import queued_jobs, site_environment, submit_dependent_script, submit_script
from tostlm.slurm.history import CODE, CONFIG, SCRIPT, SITE, SUBMITTED, JobHistory
from tostlm.slurm.restart_policy import OnStop, RestartPolicy
from tostlm.slurm.script import Resources, batch_script
from tostlm.study import load_study
from tostlm.train.batches import open_data

TASK_COMMANDS = {
    "eval": "eval perplexity",
    "bench": "bench train",
    "convert": "convert",
    "prepare": "prepare",
    "study": "study",
}
ARRAYS = ("prepare", "study")  # submitted as an array with one task per node


def submit_pretrain(
    config_file: Path,
    overrides: Sequence[str],
    resources: Resources,
    policy: RestartPolicy,
    sweep: Sequence[str] = (),
    site: Path | None = None,
    dry_run: bool = False,
) -> str:
    """Submit a run, or the runs of a sweep as an array, and return what to tell the user.

    Args:
        sweep: KEY=A,B,C each; every combination of the values becomes a run.
        site: the cluster's site.env.
        dry_run: return the batch script and submit nothing.

    Raises:
        UserError: the config does not fit its ranks, data or memory, the run is queued or running already, its folder
            cannot be written, or Slurm refuses the job. Nothing is queued then.
    """
    run = load_config(config_file, overrides)
    if sweep and (policy.chain > 1 or policy.until_done):
        raise UserError("--sweep makes one array, whose jobs restart by themselves; omit --chain and --until-done")
    array = _sweep_runs(config_file, overrides, run.run_dir, sweep) if sweep else []
    memory_gib = _gpu_memory_gib(site)
    for each in array or [run]:
        _check_run(each, resources, memory_gib)
    history = JobHistory(run.run_dir)
    if not sweep and history.step() >= run.train.steps:
        return f"{run.run_dir}: finished at step {history.step()}; raise train.steps to train further"
    script = _pretrain_script(run, array, resources, policy)
    if dry_run:
        return script.rstrip()
    require_writable(history.logs)
    with locked(history.folder / ".lock", f"{run.run_dir} is being submitted by another tostlm submit"):
        for each in [run, *array]:
            _require_idle(each.run_dir)
        for each in array or [run]:
            folder = JobHistory(each.run_dir).folder
            require_writable(folder)
            write_atomically(folder / CONFIG, dump_config(each))
        _save_submission(history, {SCRIPT: script}, site)
        jobs = [submit_script(history, SCRIPT, runs=[str(each.run_dir.absolute()) for each in array])]
        for index, each in enumerate(array):
            JobHistory(each.run_dir).add(SUBMITTED, f"{jobs[0]}_{index}")
        for _ in range(policy.chain - 1):
            jobs.append(submit_dependent_script(jobs, history, SCRIPT, "--dependency=singleton", after=jobs[-1]))
    return _describe_submission(run.run_dir, jobs, policy, len(array))


def _check_run(config: RunConfig, resources: Resources, memory_gib: float | None) -> None:
    """Check a run's batch and memory on every allowed number of nodes, its data and origin, before it is queued."""
    for nodes in resources.node_range():
        world_size = nodes * resources.ranks_per_node
        batch_plan(config, world_size)
        if memory_gib is not None:
            limit = f"TOSTLM_GPU_MEMORY_GIB={memory_gib:g}"
            require_fit(config, world_size, memory_gib * GIB, resources.gpus_per_node > 0, limit)
    open_data(config, world_size)
    find_origin(config)


def _gpu_memory_gib(site: Path | None) -> float | None:
    """Return TOSTLM_GPU_MEMORY_GIB of the environment, or else of site.env; None where neither sets it."""
    value = os.environ.get("TOSTLM_GPU_MEMORY_GIB")
    if site and not value:
        value = site_environment(site, os.environ).get("TOSTLM_GPU_MEMORY_GIB")
    try:
        return float(value) if value else None
    except ValueError:
        raise UserError(f"TOSTLM_GPU_MEMORY_GIB={value} must be a number of GiB, as 80") from None


def _require_idle(run_dir: Path) -> None:
    """Refuse a run one of whose jobs is queued or running, or in whose folder somebody trains without Slurm."""
    if queued := queued_jobs(JobHistory(run_dir).jobs()):
        raise UserError(
            f"{run_dir} is queued or running as job {queued[0].job} ({queued[0].state}); see `tostlm submit status "
            f"{run_dir}`, or end it first: `tostlm submit cancel {run_dir}`"
        )
    if run_dir.is_dir():
        with locked(run_dir / ".lock", f"{run_dir} is in use by another tostlm train; wait for it or end it"):
            pass


def _sweep_runs(config_file: Path, overrides: Sequence[str], run_dir: Path, sweep: Sequence[str]) -> list[RunConfig]:
    """Return the configs of all combinations of a sweep's values, each with a folder of its own in `run_dir`."""
    axes = []
    for axis in sweep:
        key, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--sweep {axis} must be a key and its values, as in optimizer.lr=1e-3,3e-4")
        if key == "run_dir":
            raise UserError("--sweep run_dir: each run of a sweep gets a folder of its own in run_dir; leave it out")
        axes.append([f"{key}={value}" for value in values.split(",")])
    runs = []
    for point in itertools.product(*axes):
        folder = run_dir / ",".join(point).replace("/", "_")
        runs.append(load_config(config_file, [*overrides, *point]).model_copy(update={"run_dir": folder}))
    same = [each.model_copy(update={"run_dir": run_dir}) for each in runs]
    for index, each in enumerate(same):
        if (first := same.index(each)) != index:
            names = " and ".join(dict.fromkeys(runs[point].run_dir.name for point in (first, index)))
            raise UserError(
                f"--sweep {' '.join(sweep)} makes the same run twice: {names}; name every key and value once"
            )
    return runs


def _pretrain_script(run: RunConfig, array: Sequence[RunConfig], resources: Resources, policy: RestartPolicy) -> str:
    config, *configs = (
        shlex.quote(str((JobHistory(each.run_dir).folder / CONFIG).absolute())) for each in (run, *array)
    )
    before = []
    if configs:
        config = '"${configs[$SLURM_ARRAY_TASK_ID]}"'
        before.append("\n".join(["configs=(", *(f"    {each}" for each in configs), ")"]))
    job = f"tostlm submit job {config}"
    if resources.has_node_range:
        job += f" --ranks-per-node {resources.ranks_per_node}"
        if resources.cpus_per_rank:  # which sbatch cannot be told for a range of nodes
            before.append(f"export SLURM_CPUS_PER_TASK={resources.cpus_per_rank}")
    if policy.on_stop is not OnStop.REQUEUE:
        job += f" --on-stop {policy.on_stop}"
    if policy.doctor:
        job += " --doctor"
    folder, name = JobHistory(run.run_dir).folder, _job_name(run.run_dir)
    return batch_script("pretrain", name, folder, resources, [*before, job], len(array), policy.warning_seconds)


def _job_name(run_dir: Path) -> str:
    """Return the name that all jobs of a run, and no others, have: Slurm's singleton dependency goes by the name."""
    return f"{run_dir.name}-{hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:6]}"


def _save_submission(history: JobHistory, scripts: Mapping[str, str], site: Path | None) -> None:
    """Save what is about to be submitted: scripts, site.env, the code's version."""
    files: dict[str, str | bytes] = {**scripts, SITE: site.read_bytes() if site else b"", CODE: _code_version()}
    for name, content in files.items():
        write_atomically(history.folder / name, content)


def _code_version() -> str:
    """Return this code's version, its git commit and uncommitted changes, and all installed packages."""
    folder = Path(tostlm.__file__).parent
    lines = [f"tostlm {tostlm.__version__} in {folder}"]
    for command in (["rev-parse", "HEAD"], ["status", "--short"], ["diff", "HEAD"]):
        with suppress(OSError, subprocess.SubprocessError):  # no git, or not a checkout
            git = ["git", "-C", str(folder), *command]
            result = subprocess.run(git, capture_output=True, text=True, timeout=60, check=True)
            lines += [f"\n# git {' '.join(command)}", result.stdout.rstrip()]
    packages = {f"{found.name}=={found.version}" for found in importlib.metadata.distributions()}
    return "\n".join([*lines, "\n# packages", *sorted(packages, key=str.lower)]) + "\n"


def _describe_submission(run_dir: Path, jobs: Sequence[str], policy: RestartPolicy, array_size: int) -> str:
    if array_size:
        follows = f"an array of {array_size} runs, each in a folder of {run_dir}; each restarts until it is finished"
    elif policy.until_done:
        follows = "it queues its successor when it starts, until the run is finished"
    elif len(jobs) > 1:
        follows = f"after it, one after another: {', '.join(jobs[1:])}"
    else:
        follows = "it is started again after its time limit, a preemption or a lost node until the run is finished"
    return f"job {jobs[0]}: {follows}\nsee `tostlm submit status {run_dir}`"


def submit_task(
    kind: str,
    arguments: Sequence[str],
    parsed: Mapping[str, Any],
    resources: Resources,
    site: Path | None,
    dry_run: bool,
) -> str:
    """Submit the subcommand TASK_COMMANDS[kind] with its own arguments as a job, and return what to tell the user.

    Text is prepared by an array with one task per node, and merged by a job that waits for all of them. A study's runs
    are divided among the tasks of an array.

    Args:
        parsed: what the subcommand takes the arguments for, by the names of its parameters.
        site: the cluster's site.env.
        dry_run: return the batch scripts and submit nothing.

    Raises:
        UserError: what the subcommand reads does not exist, its folder cannot be written, or Slurm refuses the job.
    """
    history = JobHistory(_task_folder(kind, parsed), kind)
    scripts = _task_scripts(kind, arguments, parsed, resources, history.folder)
    if dry_run:
        return "\n".join(scripts.values()).rstrip()
    require_writable(history.logs)
    _save_submission(history, scripts, site)
    job = submit_script(history, f"{kind}.sbatch", command=TASK_COMMANDS[kind])
    log = f"{history.logs}/{job}{'_N' if kind in ARRAYS else ''}.log"
    text = f"job {job}: tostlm {TASK_COMMANDS[kind]}; its log is {log}"
    if kind == "prepare":
        after_success = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
        merge = submit_dependent_script([job], history, "merge.sbatch", *after_success, command="prepare --merge")
        text += f"\njob {merge}: tostlm prepare --merge, when job {job} has succeeded"
    return text


def _task_folder(kind: str, parsed: Mapping[str, Any]) -> Path:
    """Return the folder for the job's script and log: that of the run it reads, or one beside what it makes."""
    if kind == "prepare":
        _check_prepare(parsed)
        return Path(f"{parsed['out']}-jobs")  # --out itself must be empty or hold prepared data
    if kind == "study":
        return load_study(Path(parsed["file"])).study_dir
    if kind == "bench":
        return load_config(Path(parsed["models"][0])).run_dir
    read = Path(parsed["source"] if kind == "convert" else parsed["models"][0])
    return run_folder(read if is_foreign(read) else resolve(read))


def _check_prepare(parsed: Mapping[str, Any]) -> None:
    tokenizer = parsed["tokenizer"]
    if parsed["merge"] or parsed["task"]:
        raise UserError("the tasks of a submitted prepare divide and merge the work; leave --task and --merge out")
    if tokenizer is None or not (parsed["source"] or parsed["more"]):
        raise UserError("prepare needs --source and --tokenizer")
    if not Path(tokenizer).exists():
        raise UserError(f"--tokenizer {tokenizer} does not exist; make it with `tostlm tokenizer train`")


def _task_scripts(
    kind: str, arguments: Sequence[str], parsed: Mapping[str, Any], resources: Resources, folder: Path
) -> dict[str, str]:
    """Return the scripts by file name, in the order they run."""
    command = f"tostlm {TASK_COMMANDS[kind]} {shlex.join(arguments)}"
    if kind not in ARRAYS:
        return {f"{kind}.sbatch": batch_script(kind, kind, folder, resources, [command])}
    _, tasks = resources.node_range()
    one_node = replace(resources, nodes="1")
    if kind == "study":
        return {"study.sbatch": batch_script(kind, kind, folder, one_node, [command], array_size=tasks)}
    command += f' --workers "${{SLURM_CPUS_PER_TASK:-1}}" --task "$SLURM_ARRAY_TASK_ID/{tasks}"'
    merge = f"tostlm prepare --merge --out {shlex.quote(str(parsed['out']))}"
    one_core = replace(one_node, cpus_per_rank=None, gpus_per_node=0)
    return {
        "prepare.sbatch": batch_script(kind, kind, folder, one_node, [command], array_size=tasks),
        "merge.sbatch": batch_script(kind, "merge", folder, one_core, [merge]),
    }
