"""The Triton backend: its kernels in the interpreter and on a GPU, and what the compiler makes of them."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

from tests.triton_kernels import SPILL_BYTES, compiled, parity, resources, tssa_launches
from tostlm.tssa.triton import BACKEND

FILE = "tests/tssa/triton_parity.py"


def test_parity_in_the_interpreter() -> None:
    parity(FILE, in_interpreter=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_parity_on_a_gpu() -> None:
    parity(FILE)


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


BUILDS = list(itertools.product((80, 90), ((12, 64), (16, 128)), (True, False)))  # GPU, heads and their width, decays
QUICK = [(80, (16, 128), False)]  # beside tests/test_kernel_report.py


@pytest.mark.parametrize(
    ("capability", "shape", "decays"),
    [*QUICK, *(pytest.param(*build, marks=pytest.mark.slow) for build in BUILDS if build not in QUICK)],
)
def test_kernels_compile_without_spilling(capability: int, shape: tuple[int, int], decays: bool) -> None:
    spills: dict[str, int] = {}
    for launch in (launch for T in (1, 70) for launch in tssa_launches(2, T, *shape, decays)):
        spills[launch.name] = max(resources(compiled(launch, capability)).spilled, spills.get(launch.name, 0))
    assert len(spills) == 8
    assert max(spills.values()) <= SPILL_BYTES, spills
