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
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from tostlm.tssa.backend import Backend, Forward, Grads
from tostlm.tssa.reference import EPS, EPS_MASS

CHUNK = 64  # tokens whose sums are fp32, and which stay in the cache between passes
SOURCES = ("kernel.cpp", "passes.h", "simd.h", "team.h")
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
WIDEST_HEAD = 256
ELEMENTS_PER_THREAD = 32_768  # fewer are done sooner than a thread awakes

_log = logging.getLogger("tostlm")


def serves(device: str, dtype: torch.dtype, head_width: int) -> bool:
    """Whether this backend can; builds the library, and says in the log why it could not."""
    fits = head_width % 16 == 0 and 0 < head_width <= WIDEST_HEAD
    return device == "cpu" and dtype in (torch.float32, torch.bfloat16) and fits and _library(head_width) is not None


def saved_states(T: int) -> int:
    """Number of chunks of T tokens."""
    return -(-T // CHUNK)


def forward(
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    energy: Tensor,
    mass: Tensor,
    weighted: Tensor,
) -> Forward:
    """See `Backend`."""
    B, T, C = w.shape
    H = temp.shape[0]
    N = saved_states(T)
    w = _dense(w, w.dtype)
    temp = _dense(temp, torch.float32)
    bias = None if bias is None else _dense(bias, torch.float32)
    rho = None if rho is None else _dense(rho, torch.float32)
    reset = None if reset is None else _dense(reset, torch.bool)
    # The kernel replaces the state in place.
    after = _copy(energy), _copy(mass), _copy(weighted)
    y = torch.empty_like(w)
    Pi, n = torch.empty(B, T, H), torch.empty(B, T, H)
    starts = torch.empty(B, N, C), torch.empty(B, N, H), torch.empty(B, N, C)
    _kernel(C // H).tssa_forward(
        *_sizes(w, H),
        w.data_ptr(),
        temp.data_ptr(),
        _address(bias),
        T * H if bias is not None and bias.dim() == 3 else 0,
        _address(rho),
        _address(reset),
        *[x.data_ptr() for x in (y, *after, Pi, n, *starts)],
    )
    return Forward(y, *after, Pi, n, *starts)


def backward(
    dy: Tensor,
    d_energy: Tensor,
    d_mass: Tensor,
    d_weighted: Tensor,
    w: Tensor,
    temp: Tensor,
    bias: Tensor | None,
    rho: Tensor | None,
    reset: Tensor | None,
    Pi: Tensor,
    n: Tensor,
    starts_energy: Tensor,
    starts_mass: Tensor,
    starts_weighted: Tensor,
    want_rho: bool,
) -> Grads:
    """See `Backend`. The bias is not needed: n has it."""
    B, _, C = w.shape
    H = temp.shape[0]
    dy, w = _dense(dy, w.dtype), _dense(w, w.dtype)
    temp = _dense(temp, torch.float32)
    rho = None if rho is None else _dense(rho, torch.float32)
    reset = None if reset is None else _dense(reset, torch.bool)
    saved = [_dense(x, torch.float32) for x in (Pi, n, starts_energy, starts_mass, starts_weighted)]
    before = _copy(d_energy), _copy(d_mass), _copy(d_weighted)
    dw, dn = torch.empty_like(w), torch.empty_like(saved[1])
    d_temp, d_rho = torch.zeros(2, B, H, dtype=torch.float64)
    _kernel(C // H).tssa_backward(
        *_sizes(w, H),
        dy.data_ptr(),
        w.data_ptr(),
        temp.data_ptr(),
        _address(rho),
        _address(reset),
        *[x.data_ptr() for x in (*saved, dw, d_temp, dn)],
        d_rho.data_ptr() if want_rho else None,
        *[x.data_ptr() for x in before],
    )
    return Grads(dw, d_temp.sum(0).float(), dn, d_rho.sum(0).float(), *before)


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it is contiguous and of that dtype already."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _copy(x: Tensor) -> Tensor:
    return x.to(torch.float64, copy=True, memory_format=torch.contiguous_format)


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _sizes(w: Tensor, H: int) -> tuple[int, int, int, int, int]:
    """The first arguments of both functions: is_bf16, threads, B, T, H."""
    B, T, _ = w.shape
    threads = min(torch.get_num_threads(), 1 + w.numel() // ELEMENTS_PER_THREAD)
    return w.dtype is torch.bfloat16, threads, B, T, H


def _kernel(head_width: int) -> ctypes.CDLL:
    library = _library(head_width)
    if library is None:
        raise RuntimeError(f"there is no TSSA kernel for heads of {head_width} channels; see the log")
    return library


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
        sizes = [ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 3]
        pointer = ctypes.c_void_p
        library.tssa_forward.argtypes = [*sizes, *[pointer] * 3, ctypes.c_int64, *[pointer] * 11]
        library.tssa_backward.argtypes = [*sizes, *[pointer] * 17]
        library.tssa_forward.restype = library.tssa_backward.restype = None
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
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*((folder / name).read_text() for name in SOURCES), *command, version, _processor()]
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


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    features = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(features))])


BACKEND = Backend(
    name="cpp",
    serves=serves,
    saved_states=saved_states,
    starts_dtype=torch.float32,
    forward=forward,
    backward=backward,
)
