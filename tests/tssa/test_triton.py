"""The Triton backend: its kernels in the interpreter and on a GPU, and what the compiler makes of them."""

import itertools
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from tostlm.tssa import Inputs, State
from tostlm.tssa.triton import BACKEND

SPILL_BYTES = 16  # a thread; more would cost more than smaller tiles
TYPES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.uint8: "u8"}


def parity(**environment: str) -> None:
    """Run triton_parity.py in a process of its own: Triton reads its environment when it is imported."""
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/tssa/triton_parity.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2000:]


def test_parity_in_the_interpreter() -> None:
    parity(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_parity_on_a_gpu() -> None:
    parity()


def test_serves_what_it_can() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert all(BACKEND.serves("cuda", dtype, width) for width in (16, 64, 100, 256))
        assert not any(BACKEND.serves("cuda", dtype, width) for width in (8, 257))
    assert not BACKEND.serves("cuda", torch.float64, 64)
    assert not BACKEND.serves("cpu", torch.float32, 64)


def test_what_is_saved_is_little_more_than_w() -> None:
    """At most 2.4 bytes a bf16 element, w itself included."""
    B, T, H, D = 1, 4096, 12, 64
    N, C = len(BACKEND.chunk_starts(T)), H * D
    saved = 2 * T * C + 4 * (2 * T * H) + BACKEND.saved_dtype.itemsize * N * (2 * C + H)
    assert saved / (B * T * C) <= 2.4


def launches(monkeypatch: pytest.MonkeyPatch, heads: int, width: int, decays: bool) -> list[tuple[Any, dict[str, Any]]]:
    """The kernels that both passes launch, with their arguments; nothing runs."""
    found = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found.append((kernel, {**dict(zip(kernel.arg_names, args, strict=False)), **named}))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    B, C = 2, heads * width
    temp = torch.ones(heads)
    for T in (1, 70):
        w = torch.zeros(B, T, C, dtype=torch.bfloat16)
        decay = (torch.ones(heads), torch.zeros(B, T, dtype=torch.bool)) if decays else (None, None)
        inputs, state = Inputs(w, temp, torch.zeros(T, heads), *decay), State.zeros(B, C, heads)
        _, _, saved = BACKEND.forward(inputs, state)
        BACKEND.backward(inputs, saved, w, state, decays)
    monkeypatch.undo()
    return found


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
        options={"num_warps": arguments["num_warps"]},
    )
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    command = [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", "/dev/stdin", "-o", os.devnull]
    log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return max(int(found) for found in re.findall(r"(\d+) bytes spill", log))


BUILDS = list(itertools.product((80, 90), ((12, 64), (16, 128)), (True, False)))  # GPU, heads and their width, decays
QUICK = [(80, (16, 128), True), (90, (16, 128), True), (90, (12, 64), False)]


@pytest.mark.parametrize(
    ("capability", "shape", "decays"),
    [*QUICK, *(pytest.param(*build, marks=pytest.mark.slow) for build in BUILDS if build not in QUICK)],
)
def test_kernels_compile_without_spilling(
    capability: int, shape: tuple[int, int], decays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spills: dict[str, int] = {}
    for kernel, arguments in launches(monkeypatch, *shape, decays):
        spills[kernel.__name__] = max(spilled(kernel, arguments, capability), spills.get(kernel.__name__, 0))
    assert len(spills) == 8
    assert max(spills.values()) <= SPILL_BYTES, spills
