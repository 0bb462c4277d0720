"""How a run's ranks end: the first that ends badly says so, for those that come after would only say they lost it."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

EXIT_REPORT = "TOSTLM_OUTCOME"  # the environment's name for the file that a job wants told
WORD_SECONDS = 5.0  # in which the rank that says what is wrong does so


def exit_rank(code: int, silent: bool = False) -> NoReturn:
    """End this rank at once, its exit code told; one that leaves what is wrong for another to say lets that tell first.

    torch's gloo threads now and then abort a process whose interpreter ends around them; all is written by now.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if code and EXIT_REPORT in os.environ:
        _tell(Path(os.environ[EXIT_REPORT]), code, silent)
    os._exit(code)


def _tell(file: Path, code: int, silent: bool) -> None:
    deadline = time.monotonic() + WORD_SECONDS
    while silent and not file.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    own = file.with_name(f"{file.name}-{rank}")
    with suppress(OSError):  # a full disk, or another rank was first
        own.write_text(f"{rank} {code}\n")
        os.link(own, file)
    with suppress(OSError):
        own.unlink()
