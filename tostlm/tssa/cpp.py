"""Causal TSSA in C++ for CPUs: `kernel.cpp` behind ctypes, compiled for this machine when it is first used.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks. One library is built for each head width a model has
(seconds), and kept in $TOSTLM_CACHE or ~/.cache/tostlm. Where there is no compiler this backend serves nothing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tostlm.tssa.backend import Backend, Grads, Inputs, Saved
from tostlm.tssa.reference import EPS, EPS_MASS
from tostlm.tssa.state import State

CHUNK = 64  # tokens whose sums are fp32, and which stay in the cache between passes
SOURCES = ("kernel.cpp", "passes.h", "simd.h", "team.h")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
WIDEST_HEAD = 256
# The functions' arguments after those that all have.
FUNCTIONS: dict[str, list[type]] = {
    "tssa_forward": [ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_void_p] * 9],
    "tssa_outputs": [ctypes.c_void_p] * 4,
    "tssa_state_grads": [ctypes.c_void_p] * 6,
    "tssa_backward": [ctypes.c_void_p] * 13,
}
ELEMENTS_PER_THREAD = 32_768  # fewer are done sooner than a thread awakes

_log = logging.getLogger("tostlm")


def serves(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """Whether this backend can; builds the library, and says in the log why it could not."""
    fits = head_width % 16 == 0 and 0 < head_width <= WIDEST_HEAD
    return device == "cpu" and dtype in (torch.float32, torch.bfloat16) and fits and _library(head_width) is not None


def forward(inputs: Inputs, state: State) -> tuple[Tensor, State, Saved]:
    """See `Backend`."""
    inputs = inputs.dense()
    y, after = torch.empty_like(inputs.w), State(*map(_copy, state))  # the kernel replaces the state in place
    saved = Saved.empty(inputs, -(-inputs.sizes[1] // CHUNK), BACKEND.saved_dtype, BACKEND.heads_first)
    _run("tssa_forward", inputs, inputs.bias, inputs.bias_stride, y, *after, saved.Pi, saved.n, *saved.chunk_states)
    return y, after, saved


def outputs(inputs: Inputs, saved: Saved) -> Tensor:
    """See `Backend`."""
    inputs = inputs.dense()
    y = torch.empty_like(inputs.w)
    _run("tssa_outputs", inputs, saved.Pi, saved.chunk_states.mass, saved.chunk_states.weighted, y)
    return y


def state_grads(inputs: Inputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    B, _, H, D = inputs.sizes
    states, grads = saved.chunk_states, State.zeros(B, H * D, H)
    arguments = grad_y.contiguous(), saved.Pi, states.mass, states.weighted, grads.mass, grads.weighted
    _run("tssa_state_grads", inputs.dense(), *arguments)
    return grads.mass, grads.weighted


def backward(inputs: Inputs, saved: Saved, grad_y: Tensor, grad_final_state: State, with_rho: bool) -> Grads:
    """See `Backend`. The bias is not needed: n has it."""
    inputs = inputs.dense()
    B, _, H, _ = inputs.sizes
    grad_state = State(*map(_copy, grad_final_state))  # the kernel replaces it in place by the initial state's
    grad_w, grad_n = torch.empty_like(inputs.w), torch.empty_like(saved.n)
    grad_temp, grad_rho = (torch.zeros(B, H, dtype=torch.float64) for _ in range(2))
    found = grad_w, grad_temp, grad_n, grad_rho if with_rho else None, *grad_state
    _run("tssa_backward", inputs, grad_y.contiguous(), saved.Pi, saved.n, *saved.chunk_states, *found)
    return Grads(grad_w, grad_temp.sum(0).float(), grad_n, grad_rho.sum(0).float(), grad_state)


def _run(function: str, inputs: Inputs, *arguments: Tensor | int | None) -> None:
    """Call a function of the kernel: is_bf16, threads, B, T, H, w, temp, rho, document_start, and its own arguments."""
    B, T, H, D = inputs.sizes
    library = _library(D)
    if library is None:
        raise RuntimeError(f"there is no TSSA kernel for heads of {D} channels; see the log")
    threads = min(torch.get_num_threads(), 1 + inputs.w.numel() // ELEMENTS_PER_THREAD)
    tensors = inputs.w, inputs.temp, inputs.rho, inputs.document_start_mask
    addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in (*tensors, *arguments)]
    getattr(library, function)(inputs.w.dtype is torch.bfloat16, threads, B, T, H, *addresses)


def _copy(x: Tensor) -> Tensor:
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


@functools.cache
def _library(head_width: int) -> ctypes.CDLL | None:
    """The kernel for heads of that width, built unless the cache has it; None, and why in the log, without it."""
    try:
        library = ctypes.CDLL(str(_built(head_width)))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        why = next(iter(lines), f"{error.cmd[0]} failed with exit status {error.returncode}")
    except OSError as error:
        why = str(error)
    else:
        call = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 3, *[ctypes.c_void_p] * 4]
        for function, arguments in FUNCTIONS.items():
            getattr(library, function).argtypes = [*call, *arguments]
            getattr(library, function).restype = None
        return library
    _log.warning("the C++ backend of TSSA cannot be built, the torch backend serves instead: %s", why)
    return None


def _built(head_width: int) -> Path:
    """Path of the library for heads of that width.

    Raises:
        OSError: there is no compiler, or the cache folder cannot be written.
        subprocess.CalledProcessError: the compiler failed.
    """
    folder = Path(__file__).parent
    compiler = _compiler()
    defines = {"HEAD_WIDTH": head_width, "CHUNK": CHUNK, "EPS": f"{EPS}f", "EPS_MASS": f"{EPS_MASS}f"}
    command = [*compiler, *FLAGS, *(f"-D{name}={value}" for name, value in defines.items()), str(folder / SOURCES[0])]
    # On its stderr the compiler says its version, and what -march=native stands for on this processor.
    describe = [*compiler, "-march=native", "-E", "-v", "-xc++", os.devnull]
    about = subprocess.run(describe, capture_output=True, text=True, check=True).stderr
    parts = [*((folder / name).read_text() for name in SOURCES), *command, about]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("TOSTLM_CACHE") or Path.home() / ".cache" / "tostlm")
    path = cache / f"tssa-{head_width}-{digest}.so"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:  # several ranks may build at once
            made = Path(scratch, path.name)
            subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=True)
            made.replace(path)
    return path


def _compiler() -> list[str]:
    """$CXX, or the first C++ compiler on the path."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["c++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise FileNotFoundError(f"no C++ compiler: {named[0]} is not there" if named else "no C++ compiler on the PATH")


BACKEND = Backend(
    "cpp", serves, lambda T: range(0, T, CHUNK), torch.float32, False, forward, outputs, state_grads, backward
)
