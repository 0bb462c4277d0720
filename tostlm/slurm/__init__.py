"""Runs as jobs of a Slurm cluster: submitted, started again, looked after."""

from tostlm.slurm.job import OnStop, run_job
from tostlm.slurm.script import Resources
from tostlm.slurm.status import cancel, status
from tostlm.slurm.submit import RestartPolicy, pretrain
from tostlm.slurm.tasks import submit_task

__all__ = ["OnStop", "Resources", "RestartPolicy", "cancel", "pretrain", "run_job", "status", "submit_task"]
