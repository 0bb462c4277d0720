"""The one exception that users see, and the exit codes that launchers read."""

from __future__ import annotations

EXIT_REQUEUE = 75  # stopped on request with everything saved: the same command goes on
EXIT_LOST_RANK = 76  # a rank died or hung: the same command goes on from the newest checkpoint


class UserError(Exception):
    """A mistake the user can mend, or a limit of the machine.

    The message names the value, the rule and the way out. The command line prints it as one line and exits with
    code 2; every other exception is a defect of this project and keeps its traceback.
    """


def reason_of(error: BaseException) -> str:
    """An exception's message in one line, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
