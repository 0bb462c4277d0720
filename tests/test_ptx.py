"""The accesses that are computed from PTX are those that a kernel's source asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

import triton
import triton.language as tl

from tests.ptx import Access, accesses
from tests.triton_kernels import Launch, compiled

X, Y = 1 << 32, 2 << 32  # where the tensors are
BLOCK = THREADS = 128


@triton.jit
def copy_kernel(x, y, n, steps, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a block a step of numbers that are STRIDE apart."""
    for step in range(steps):
        i = (tl.program_id(0) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y + i, tl.load(x + i * STRIDE, mask=i < n, other=0.0), mask=i < n)


@triton.jit
def gather_kernel(x, y, n, steps, BLOCK: tl.constexpr):
    i = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + i, i, mask=i < n)


def found(kernel: Any, programs: int, steps: int, n: int, dtype: torch.dtype, **constants: int) -> list[Access]:
    x = torch.zeros(1, dtype=dtype)
    arguments = {"x": x, "y": x, "n": n, "steps": steps, "BLOCK": BLOCK, "num_warps": THREADS // 32, **constants}
    ptx = compiled(Launch(kernel, (programs,), arguments), 80).asm["ptx"]
    return list(accesses(ptx, [X, Y, n, steps], [(program, 0) for program in range(programs)], THREADS))


@pytest.mark.parametrize(("stride", "used"), [(1, 1.0), (2, 0.5), (8, 0.125)])
def test_every_number_is_read_and_written_once(stride: int, used: float) -> None:
    steps, programs, n = 2, 3, 5 * BLOCK + 64  # the last of six blocks is not full
    moved = found(copy_kernel, programs, steps, n, torch.float32, STRIDE=stride)
    for store, base, apart in ((False, X, stride), (True, Y, 1)):
        of_kind = [access for access in moved if access.store == store]
        begins = [address for access in of_kind for address in access.addresses.ravel() if address >= 0]
        width = of_kind[0].width
        numbers = sorted((int(address) - base + byte) // 4 for address in begins for byte in range(0, width, 4))
        assert numbers == [i * apart for i in range(n)]
        sectors, different = (sum(some) for some in zip(*(x.sectors_and_bytes() for x in of_kind), strict=True))
        assert different == sum(x.bytes_of_programs() for x in of_kind) == 4 * n
        assert different / (32 * sectors) == (used if store is False else 1.0)


def test_numbers_that_all_warps_read_count_once_a_program_and_for_each_warp() -> None:
    (load, *_) = found(copy_kernel, 1, 1, BLOCK, torch.float32, STRIDE=0)
    assert load.bytes_of_programs() == 4
    assert load.sectors_and_bytes() == (4, 4 * 4)


def test_what_depends_on_loaded_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="depends on what the kernel loads"):
        found(gather_kernel, 1, 1, BLOCK, torch.uint8)
