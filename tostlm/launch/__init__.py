"""Starting, identifying and ending the processes of a run."""

from tostlm.launch.environment import EXIT_REPORT, RankInfo, exit_rank, export_rendezvous, rank_from_environment
from tostlm.launch.local import run_local

__all__ = ["EXIT_REPORT", "RankInfo", "exit_rank", "export_rendezvous", "rank_from_environment", "run_local"]
