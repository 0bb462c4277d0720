"""How the command line ends: what is said of an error, and the exit code."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback

from tostlm.cli import app
from tostlm.errors import (
    EXIT_BUG,
    EXIT_LOST_RANK,
    EXIT_LOST_UNNAMED,
    EXIT_USER_ERROR,
    UserError,
    error_summary,
    is_lost_peer,
    is_out_of_memory,
    report,
)
from tostlm.launch import EXIT_REPORT, exit_rank
from tostlm.launch.local import LAUNCHED

USER_ERRNOS = (  # a full disk, a limit of the user's, and paths that cannot be written
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
EXIT_INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 2, an interruption 130, a lost rank 76."""
    code = _run()
    if _is_rank():
        exit_rank(code)
    sys.exit(code)


def _is_rank() -> bool:
    return "RANK" in os.environ or EXIT_REPORT in os.environ  # or on its way to become one


def _run() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # a terminal of another encoding than UTF-8 shows what it can
    try:
        app()
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            return _report_bug()
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror}{where}; free or choose another place and try again: what was finished stays")
    except (MemoryError, RuntimeError) as error:
        if "RANK" in os.environ and is_lost_peer(error):  # before training; its launcher reports the reason
            return EXIT_LOST_UNNAMED if LAUNCHED in os.environ else EXIT_LOST_RANK
        if not is_out_of_memory(error):
            return _report_bug()
        what = f"out of memory ({error_summary(error)})"
        code = _fail(f"{what}; use a smaller model, context or micro-batch, unless another process holds the memory")
        return EXIT_LOST_RANK if _is_rank() else code  # another start finds the memory free, or another node
    except SystemExit as ending:  # typer's own; it turns an interruption into one
        if ending.code == EXIT_INTERRUPTED and "RANK" not in os.environ:  # of a rank, its launcher reports it
            print("\ntostlm: interrupted; the same command continues from what is finished", file=sys.stderr)
        code = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        if _is_rank():
            exit_rank(code, silent=code in (EXIT_USER_ERROR, EXIT_LOST_RANK))  # rank 0 reports what it found for all
        return code
    except Exception as error:
        return _fail(str(error)) if _is_backend_error(error) else _report_bug()
    return 0


def _is_backend_error(error: Exception) -> bool:
    """Return whether a backend of the operator was asked for that is not there; the operator knows no `UserError`."""
    if not isinstance(error, ValueError):
        return False
    from tostlm.tssa import BackendError

    return isinstance(error, BackendError)


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    of_rank = "" if rank == "0" else f" on rank {rank}"
    report(f"error{of_rank}: {message}")
    return EXIT_USER_ERROR


def _report_bug() -> int:
    traceback.print_exc()
    return EXIT_BUG
