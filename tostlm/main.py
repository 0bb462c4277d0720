"""How the command line ends: what is said of an error, and the exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback

from tostlm.cli import app
from tostlm.errors import EXIT_LOST_RANK, UserError, is_lost_peer, reason_of
from tostlm.launch import leave

MENDABLE = (  # limits of a disk, and paths that cannot be written
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)
INTERRUPTED = 128 + signal.SIGINT


def main() -> None:
    """Run a command; a user's mistake is one line and exit code 2, an interruption 130, a lost rank 76."""
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    if "RANK" in os.environ:
        leave(code)
    sys.exit(code)


def _run() -> int:
    try:
        app()
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno not in MENDABLE:
            return _defect()
        where = f" ({error.filename})" if error.filename else ""
        return _fail(f"{error.strerror}{where}; free or choose another place and try again: what was finished stays")
    except (MemoryError, RuntimeError) as error:
        if "RANK" in os.environ and is_lost_peer(error):  # before training; the lost one and its launcher say why
            return EXIT_LOST_RANK
        if not isinstance(error, MemoryError) and "allocate" not in str(error) and "out of memory" not in str(error):
            return _defect()
        return _fail(f"out of memory ({reason_of(error)}); use a smaller model, context or micro-batch")
    except SystemExit as ending:  # typer's own; it turns an interruption into one
        if ending.code == INTERRUPTED and "RANK" not in os.environ:  # of a rank its launcher says it
            print("\ntostlm: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return ending.code if isinstance(ending.code, int) else int(ending.code is not None)
    except Exception:
        return _defect()
    return 0


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")
    of_rank = "" if rank == "0" else f" on rank {rank}"
    print(f"tostlm: error{of_rank}: {message}", file=sys.stderr)
    return 2


def _defect() -> int:
    traceback.print_exc()
    return 1
