"""How a run's ranks end: the first that ends badly says so, for those that come after would only say they lost it."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import NoReturn

OUTCOME = "TOSTLM_OUTCOME"  # the environment's name for the file that a job wants told


def leave(code: int) -> NoReturn:
    """End this rank at once, its exit code told.

    torch's gloo threads now and then abort a process whose interpreter ends around them; all is written by now.
    """
    if code and OUTCOME in os.environ:
        with suppress(OSError):  # another rank was first
            descriptor = os.open(os.environ[OUTCOME], os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(descriptor, f"{os.environ.get('RANK', '0')} {code}\n".encode())
            os.close(descriptor)
    os._exit(code)
