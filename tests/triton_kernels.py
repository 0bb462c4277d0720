"""What tests of Triton kernels share: a process of their own, launches, and what the compiler makes of a kernel."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cuxray
import pytest
import torch
import triton
from cuxray.toolchain import Toolchain
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.conftest import ROOT
from tostlm.chain import triton as chain_kernels
from tostlm.tssa import Inputs, State
from tostlm.tssa.backend import Saved
from tostlm.tssa.triton import BACKEND

SPILL_BYTES = 16  # a thread; more would cost more than smaller tiles
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8"}
OPTIONS = ("num_warps", "num_stages", "maxnreg")


class Launch(NamedTuple):
    """A kernel, the programs it is launched on, and its arguments by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def passed(self) -> list[Any]:
        """What a compiled kernel is given, in order: all but what it is compiled for."""
        values = [(parameter, self.arguments[parameter.name]) for parameter in self.kernel.params]
        return [value for parameter, value in values if not parameter.is_constexpr and value is not None]


class Resources(NamedTuple):
    """What a compiled kernel takes of a multiprocessor."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread that its registers do not hold
    warps: int  # of at most 64, that a multiprocessor holds at once


def parity(file: str, in_interpreter: bool = False) -> None:
    """Run a file of tests in a process of its own: Triton reads its environment when it is imported.

    Types are not checked there, as that would wrap the kernels.
    """
    environment = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", file],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **(environment if in_interpreter else {})},
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]


def recorded(run: Callable[[], object]) -> list[Launch]:
    """Return the launches of kernels that a function makes; no kernel runs."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append(Launch(kernel, grid, {**dict(zip(kernel.arg_names, args, strict=False)), **named}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.JITFunction, "run", record)
        run()
    return found


class _TorchLaunches(TorchDispatchMode):
    """Counts torch's operations that are a kernel on a GPU: those that return more than a view or empty memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += not (func.is_view or "empty" in name or name == "promote_types")
        return func(*args, **(kwargs or {}))


def torch_launches(run: Callable[[], object]) -> int:
    """Return how many kernels of torch's own a function launches on a GPU beside Triton's."""
    with _TorchLaunches() as found:
        recorded(run)
    return found.count


def tssa_passes(B: int, T: int, H: int, D: int, decays: bool) -> dict[str, Callable[[], object]]:
    """Return the passes of TSSA in bf16, with all its inputs but decays, and the gradient of rho if it decays."""
    w = torch.zeros(B, T, H * D, dtype=torch.bfloat16)
    decay = (torch.ones(H), torch.zeros(B, T, dtype=torch.bool)) if decays else (None, None)
    inputs, state = Inputs(w, torch.ones(H), torch.zeros(T, H), *decay), State.zeros(B, H * D, H)
    saved = Saved.empty(inputs, len(BACKEND.chunk_starts(T)), BACKEND.saved_dtype, BACKEND.heads_first)
    return {
        "forward": lambda: BACKEND.forward(inputs, state),
        "backward": lambda: BACKEND.backward(inputs, saved, w, state, decays),
    }


def tssa_launches(B: int, T: int, H: int, D: int, decays: bool) -> list[Launch]:
    """Return what both passes launch."""
    return [launch for run in tssa_passes(B, T, H, D, decays).values() for launch in recorded(run)]


def chain_launches(N: int, L: int, D: int, V: int) -> list[Launch]:
    """Return what a chain of N steps launches in fp32 and in fp64, and one with products."""
    own, reads, ends, kept, added = (torch.zeros(1, N, 1, *shape) for shape in ((L, V), (L, D), (D, L), (D, 1), (D, V)))
    chain = added, kept, (first := torch.zeros(1, 1, D, V))
    return [
        *recorded(lambda: chain_kernels.chain(*chain, False)),
        *recorded(lambda: chain_kernels.chain(*(x.double() for x in chain), False)),
        *recorded(lambda: chain_kernels.delta_chain(own, reads, ends, kept, added, first, True)),
    ]


def compiled(launch: Launch, capability: int) -> Any:
    """Compile a launch for a GPU, as Triton does when it is there."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: launch.arguments[name] for name in OPTIONS if name in launch.arguments},
    )


def resources(kernel: Any) -> Resources:
    """Return what a compiled kernel takes, which cuxray reads from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(kernel.asm["cubin"])
        about = kernel.metadata
        report = cuxray.build_report(
            path, _tools(), f"{32 * about.num_warps}", smem_dynamic=about.shared, level="resources", use_cache=False
        )
    (found,) = report["units"][0]["kernels"]
    # The compiler puts on the stack what the registers do not hold, and nothing else here.
    return Resources(found["resources"]["regs"], found["resources"]["stack_frame"], found["occupancy"]["active_warps"])


@cache
def _tools() -> Toolchain:
    """NVIDIA's tools that Triton ships."""
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return Toolchain(folder / "nvdisasm", folder / "cuobjdump", None, "triton")
