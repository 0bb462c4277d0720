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
from typing import NamedTuple

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


def chunk_starts(T: int) -> range:
    """First token of each chunk of T tokens."""
    return range(0, T, CHUNK)


def forward(inputs: Inputs, state: State) -> tuple[Tensor, State, Saved]:
    """See `Backend`."""
    B, T, H, D = inputs.sizes
    N = len(chunk_starts(T))
    call = _KernelCall.of(inputs)
    bias = None if inputs.bias is None else _dense(inputs.bias, torch.float32)
    after = State(*map(_copy, state))  # the kernel replaces it in place
    y = torch.empty_like(call.w)
    chunk_states = State(*(torch.empty(B, N, size) for size in (H * D, H, H * D)))
    saved = Saved(torch.empty(B, T, H), torch.empty(B, T, H), chunk_states)
    bias_stride = T * H if bias is not None and bias.dim() == 3 else 0
    call.run("tssa_forward", bias, bias_stride, y, *after, saved.Pi, saved.n, *saved.chunk_states)
    return y, after, saved


def outputs(inputs: Inputs, saved: Saved) -> Tensor:
    """See `Backend`."""
    call = _KernelCall.of(inputs)
    y = torch.empty_like(call.w)
    Pi, _, states = _dense_saved(saved)
    call.run("tssa_outputs", Pi, states.mass, states.weighted, y)
    return y


def state_grads(inputs: Inputs, saved: Saved, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """See `Backend`."""
    B, _, H, D = inputs.sizes
    call = _KernelCall.of(inputs)
    Pi, _, states = _dense_saved(saved)
    grads = torch.zeros(B, H, dtype=torch.float64), torch.zeros(B, H * D, dtype=torch.float64)
    call.run("tssa_state_grads", _dense(grad_y, call.w.dtype), Pi, states.mass, states.weighted, *grads)
    return grads


def backward(inputs: Inputs, saved: Saved, grad_y: Tensor, grad_final_state: State, with_rho: bool) -> Grads:
    """See `Backend`. The bias is not needed: n has it."""
    B, _, H, _ = inputs.sizes
    call = _KernelCall.of(inputs)
    Pi, n, states = _dense_saved(saved)
    grad_state = State(*map(_copy, grad_final_state))  # the kernel replaces it in place by the initial state's
    grad_w, grad_n = torch.empty_like(call.w), torch.empty_like(n)
    grad_temp, grad_rho = (torch.zeros(B, H, dtype=torch.float64) for _ in range(2))
    rho_sums = grad_rho if with_rho else None
    grad_y = _dense(grad_y, call.w.dtype)
    call.run("tssa_backward", grad_y, Pi, n, *states, grad_w, grad_temp, grad_n, rho_sums, *grad_state)
    return Grads(grad_w, grad_temp.sum(0).float(), grad_n, grad_rho.sum(0).float(), grad_state)


class _KernelCall(NamedTuple):
    """The inputs of all functions of the kernel, as it reads them."""

    w: Tensor
    temp: Tensor
    rho: Tensor | None
    document_start_mask: Tensor | None

    @classmethod
    def of(cls, inputs: Inputs) -> _KernelCall:
        rho, mask = inputs.rho, inputs.document_start_mask
        return cls(
            _dense(inputs.w, inputs.w.dtype),
            _dense(inputs.temp, torch.float32),
            None if rho is None else _dense(rho, torch.float32),
            None if mask is None else _dense(mask, torch.bool),
        )

    def run(self, function: str, *arguments: Tensor | int | None) -> None:
        """Call a function of the kernel: is_bf16, threads, B, T, H, w, temp, rho, document_start, and its arguments."""
        B, T, C = self.w.shape
        H = self.temp.shape[0]
        library = _library(C // H)
        if library is None:
            raise RuntimeError(f"there is no TSSA kernel for heads of {C // H} channels; see the log")
        threads = min(torch.get_num_threads(), 1 + self.w.numel() // ELEMENTS_PER_THREAD)
        sizes = (self.w.dtype is torch.bfloat16, threads, B, T, H)
        addresses = [x.data_ptr() if isinstance(x, Tensor) else x for x in (*self, *arguments)]
        getattr(library, function)(*sizes, *addresses)


def _dense_saved(saved: Saved) -> Saved:
    Pi, n, states = saved
    return Saved(
        _dense(Pi, torch.float32), _dense(n, torch.float32), State(*(_dense(x, torch.float32) for x in states))
    )


def _dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself where it is contiguous and of that dtype already."""
    return x if x.dtype is dtype and x.is_contiguous() else x.to(dtype).contiguous()


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


BACKEND = Backend("cpp", serves, chunk_starts, torch.float32, forward, outputs, state_grads, backward)
