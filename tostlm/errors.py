"""The one exception that users see."""

from __future__ import annotations


class UserError(Exception):
    """A mistake the user can mend, or a limit of the machine.

    The message names the value, the rule and the way out. The command line prints it as one line and exits with
    code 2; every other exception is a defect of this project and keeps its traceback.
    """


def reason_of(error: BaseException) -> str:
    """An exception's message in one line, or its kind where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
