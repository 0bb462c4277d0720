"""Jobs of one step beside training: preparing text, evaluating, timing and converting models."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tostlm.checkpoint import resolve
from tostlm.config import load_config
from tostlm.errors import UserError
from tostlm.files import require_writable
from tostlm.slurm.commands import submit_after, submit_script
from tostlm.slurm.history import LOGS, SITE, SUBMITTED, JobHistory
from tostlm.slurm.script import Resources, batch_script
from tostlm.slurm.submit import keep

VERBS = {"eval": "eval perplexity", "bench": "bench train", "convert": "convert", "prepare": "prepare"}


def submit_task(kind: str, arguments: Sequence[str], resources: Resources, site: Path | None, dry_run: bool) -> str:
    """Submit the verb of VERBS with its own arguments; returns what to tell the user.

    Text is prepared by an array of a task a node, and merged by a job that waits for all of them.

    Raises:
        UserError: what the verb reads is not there, its folder cannot be written, or Slurm refuses.
    """
    record = JobHistory(_folder(kind, arguments))
    scripts = _scripts(kind, arguments, resources, record, site)
    if dry_run:
        return "\n".join(scripts.values()).rstrip()
    require_writable(record.logs)
    own_site = keep(record, scripts, site)
    first, *rest = (record.folder / name for name in scripts)
    job = submit_script(first, own_site)
    record.add(SUBMITTED, job, verb=VERBS[kind])
    told = f"job {job}: tostlm {VERBS[kind]}; its log is {record.logs}/{job}{'_N' if rest else ''}.log"
    for script in rest:
        when_it_ended_well = (f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
        waiting = submit_after([job], script, own_site, *when_it_ended_well)
        record.add(SUBMITTED, waiting, verb="prepare --merge")
        told += f"\njob {waiting}: tostlm prepare --merge, when job {job} has ended well"
    return told


def _folder(kind: str, arguments: Sequence[str]) -> Path:
    """Where the job's script and log belong: with what it reads, or what it makes."""
    if kind == "prepare":
        for option in ("--source", "--tokenizer", "--out"):
            if option not in arguments[:-1]:
                raise UserError(f"{option} is missing; give the options of `tostlm prepare`")
        tokenizer = Path(arguments[arguments.index("--tokenizer") + 1])
        if not tokenizer.exists():
            raise UserError(f"--tokenizer {tokenizer} does not exist; make it with `tostlm tokenizer train`")
        return Path(f"{_out(arguments)}-jobs")  # a folder that is no prepared data is refused as --out
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named is None:
        raise UserError(f"give the arguments of `tostlm {VERBS[kind]}`")
    return load_config(Path(named)).run_dir if kind == "bench" else resolve(Path(named)).parent.parent


def _out(arguments: Sequence[str]) -> str:
    return arguments[arguments.index("--out") + 1]


def _scripts(
    kind: str, arguments: Sequence[str], resources: Resources, record: JobHistory, site: Path | None
) -> dict[str, str]:
    """The scripts by their file's name, in the order they run."""
    folder, made_by = record.folder.absolute(), f"tostlm submit {kind}"
    common = ["--requeue", "--open-mode=append", f"--chdir={Path.cwd()}"]
    own_site = folder / SITE if site else None
    command = f"tostlm {VERBS[kind]} {shlex.join(arguments)}"

    def script(name: str, resources: Resources, command: str, log: str, *more: str) -> str:
        options = [f"--job-name={name}", *resources.options(), *common, f"--output={folder / LOGS / log}.log", *more]
        return batch_script(made_by, options, own_site, [command])

    if kind != "prepare":
        return {f"{kind}.sbatch": script(kind, resources, command, "%j")}
    _, tasks = resources.fewest_and_most_nodes()
    command += f' --workers "${{SLURM_CPUS_PER_TASK:-1}}" --task "$SLURM_ARRAY_TASK_ID/{tasks}"'
    one = replace(resources, nodes="1")
    merge = f"tostlm prepare --merge --out {shlex.quote(_out(arguments))}"
    return {
        "prepare.sbatch": script(kind, one, command, "%A_%a", f"--array=0-{tasks - 1}"),
        "merge.sbatch": script("merge", replace(one, cpus_per_rank=None, gpus_per_node=0), merge, "%j"),
    }
