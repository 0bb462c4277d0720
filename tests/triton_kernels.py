"""What tests of Triton kernels share: a process of their own, and what the compiler makes of a kernel."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tests.conftest import ROOT

Launch = tuple[Any, dict[str, Any]]  # a kernel and its arguments
SPILL_BYTES = 16  # a thread; more would cost more than smaller tiles
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8"}


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


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Yield a list that the launches of kernels are added to, with their arguments by name; nothing runs."""
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named}))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(triton.JITFunction, "run", record)
        yield found


def spilled(kernel: Any, arguments: dict[str, Any], capability: int) -> int:
    """Compile a launch for a GPU and return the bytes a thread spills."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            aligned[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments},
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", "/dev/stdin", "-o", os.devnull]
    log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return max(int(found) for found in re.findall(r"(\d+) bytes spill", log))
