"""Runs as jobs of a Slurm cluster: submission, restarts, status."""

from tostlm.slurm.job import run_job
from tostlm.slurm.restart_policy import OnStop, RestartPolicy
from tostlm.slurm.script import TEMPLATES, Resources
from tostlm.slurm.status import cancel_jobs, run_status
from tostlm.slurm.submit import TASK_COMMANDS, submit_pretrain, submit_task

__all__ = [
    "TASK_COMMANDS",
    "TEMPLATES",
    "OnStop",
    "Resources",
    "RestartPolicy",
    "cancel_jobs",
    "run_job",
    "run_status",
    "submit_pretrain",
    "submit_task",
]
