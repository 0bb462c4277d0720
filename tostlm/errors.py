"""The one exception that users see, and the exit codes that launchers read."""

from __future__ import annotations

import re
import sys
from contextlib import suppress

EXIT_BUG, EXIT_USER_ERROR = 1, 2
EXIT_REQUEUE = 75  # stopped on request with everything saved: the same command resumes
EXIT_LOST_RANK = 76  # a rank died or hung: the same command resumes from the newest checkpoint
EXIT_LOST_UNNAMED = 77  # of a rank to its launcher on this machine: as 76, but it could not say which rank is lost

# Messages of gloo, NCCL and torch's store about a process at the other end.
LOST_PEER = re.compile(
    "Connection (closed|reset) by peer|Connection refused|Broken pipe|Connection was likely closed|Timed out waiting"
    "|remote process exited|NCCL communicator was aborted"
)


class UserError(Exception):
    """A mistake that the user can fix, or a limit of the machine.

    The message names the value, the rule and the way out. The command line prints it as one line and exits with
    code 2; every other exception is a bug in this project and keeps its traceback.
    """


def report(line: str) -> None:
    """Print a line for the user on stderr, unless that cannot be written: a log may be on the disk that is full."""
    with suppress(OSError):
        print(f"tostlm: {line}", file=sys.stderr, flush=True)


def error_summary(error: BaseException) -> str:
    """Return an exception's message in one line, or the name of its class where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is of Python or torch that memory ran out, on the host or on a GPU."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate", "out of memory"))
    return said or isinstance(error, MemoryError)


def is_lost_peer(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is a collective that lost the process at its other end."""
    while error is not None:
        if isinstance(error, RuntimeError) and LOST_PEER.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False
