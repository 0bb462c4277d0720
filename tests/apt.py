"""Programs of Debian that tests take, installed where they are missing if the environment asks for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SWITCH = "TOSTLM_TEST_INSTALL"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def missing_reason(commands: Sequence[str], packages: Sequence[str]) -> str | None:
    """Return which command is missing and cannot be installed, or None. With SWITCH=1 set, install packages first."""
    with Path(tempfile.gettempdir(), "tostlm-test-install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of the processes that share the tests one installs, and the others wait
        names = ", ".join(command for command in commands if not shutil.which(command, path=PATH))
        if not names:
            return None
        if os.environ.get(SWITCH) != "1":
            return f"{names} not installed; set {SWITCH}=1 to let the tests install {' '.join(packages)} with apt-get"
        if not shutil.which("apt-get"):
            return f"{names} not installed; install Debian's {' '.join(packages)} to enable"
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # 1: no daemon is started
        for command in (["update"], ["install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", "-qq", *command], capture_output=True, text=True, env=environment)
            if done.returncode:
                return f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}"
    return None
