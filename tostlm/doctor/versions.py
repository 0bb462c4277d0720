"""The same software and config on every rank."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import tostlm
from tostlm.config import RunConfig, dump_config
from tostlm.doctor.finding import OK, Finding, minority, unfit

PACKAGES = ("torch", "deepspeed", "tostlm")


def measure(config: RunConfig) -> dict[str, str]:
    """This rank's versions; of tostlm's own source and of the config a digest, as they change without one."""
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    sources = sorted(Path(tostlm.__file__).parent.rglob("*.py"))
    return {
        "python": platform.python_version(),
        **versions,
        "source of tostlm": _digest(b"".join(path.read_bytes() for path in sources)),
        "config": _digest(dump_config(config).encode()),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def judge(versions: Sequence[dict[str, str]], hosts: Sequence[str]) -> Finding:
    """Whether all ranks' are one rank's."""
    odd, usual = minority([tuple(own.items()) for own in versions])
    if not odd:
        return Finding("versions", OK, ", ".join(f"{name} {version}" for name, version in versions[0].items()))
    theirs, ours = versions[odd[0]], versions[usual]
    differing = [key for key in ours if theirs[key] != ours[key]]
    why = ", ".join(f"{key} is {theirs[key]} on rank {odd[0]}, elsewhere {ours[key]}" for key in differing)
    return unfit("versions", odd, hosts, why, "install the same there")
