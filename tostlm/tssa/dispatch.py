"""Which backend serves a tensor."""

from __future__ import annotations

import functools
import importlib
import logging
import os

import torch
from torch import Tensor

from tostlm.tssa.backend import Backend
from tostlm.tssa.chunked import BACKEND as TORCH

VARIABLE = "TOSTLM_TSSA_BACKEND"
COMPILED = {"triton": "cuda", "cpp": "cpu"}  # the device each is for; an exported model is without them
REFERENCE = "reference"

_log = logging.getLogger("tostlm")


class BackendError(ValueError):
    """There is no backend of a name, or it does not serve a tensor."""


def requested_backend(name: str | None) -> str:
    """Return the backend that a caller asks for, else the one that the environment names; "" for the fastest."""
    return os.environ.get(VARIABLE, "") if name is None else name


def choose(w: Tensor, heads: int, backend: str | None = None) -> Backend:
    """Return the requested backend, or the fastest that serves `w` [B, T, C].

    Raises:
        BackendError: there is no such backend, or it does not serve `w`.
    """
    name = requested_backend(backend)
    try:
        return _choose(name, w.device.type, w.dtype, int(w.shape[-1]) // int(heads))
    except BackendError as error:
        raise BackendError(f"{VARIABLE}={name}: {error}" if backend is None else str(error)) from None


@functools.cache
def _choose(name: str, device: str, dtype: torch.dtype, head_width: int) -> Backend:
    if name not in ("", "torch", *COMPILED):
        raise BackendError(
            f"TSSA backend {name!r} is not available here; use {', '.join(COMPILED)}, torch or {REFERENCE}"
        )
    for candidate in [name] if name else [own for own, kind in COMPILED.items() if kind == device]:
        backend = TORCH if candidate == "torch" else _load(candidate)
        if backend is not None and backend.serves(device, dtype, head_width):
            break
        if name:
            raise BackendError(
                f"TSSA backend {name} does not serve {dtype} on {device} with heads of {head_width} channels"
            )
    else:
        backend = TORCH
    _log.info("TSSA of %s on %s with heads of %d channels: backend %s", dtype, device, head_width, backend.name)
    return backend


def _load(name: str) -> Backend | None:
    try:
        backend: Backend = importlib.import_module(f"tostlm.tssa.{name}").BACKEND
    except ImportError:
        return None
    return backend
