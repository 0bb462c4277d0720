"""Starting and ending the processes of a run."""

from tostlm.launch.local import run_local
from tostlm.launch.outcome import OUTCOME, leave
from tostlm.launch.ranks import Ranks, export_rendezvous, ranks_from_environment

__all__ = ["OUTCOME", "Ranks", "export_rendezvous", "leave", "ranks_from_environment", "run_local"]
