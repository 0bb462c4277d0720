"""What Triton's kernels must leave of a GPU's registers and use of its memory, on every GPU they are compiled for."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

from tests.kernel_report import FILE, FLOOR, GPUS, Figures, bytes_of, launches, measure
from tests.triton_kernels import SPILL_BYTES, torch_launches, tssa_passes

WARPS, STREAMING_WARPS = 16, 32  # of a multiprocessor's 64
STREAMING = {"energy_sums", "memberships", "outputs", "gate_grad_sums", "chain", "chain fp64"}
SECTORS = 0.75
OVER_THE_FLOOR = 1.5
LAUNCHES = 5  # of a layer's pass


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(gpu, id=name, marks=() if name == "sm_90a" else pytest.mark.slow) for gpu, name in GPUS.items()
    ],
)
def passes(request: pytest.FixtureRequest) -> dict[str, list[Figures]]:
    return {name: [measure(launch, request.param) for launch in some] for name, some in launches().items()}


@pytest.fixture
def kernels(passes: dict[str, list[Figures]]) -> dict[str, Figures]:
    return {figures.name: figures for some in passes.values() for figures in some}


def test_warps_wait_for_memory_beside_others(kernels: dict[str, Figures]) -> None:
    assert kernels.keys() >= STREAMING
    for name, figures in kernels.items():
        assert figures.resources.warps >= (STREAMING_WARPS if name in STREAMING else WARPS), figures


def test_registers_hold_what_threads_compute(kernels: dict[str, Figures]) -> None:
    for figures in kernels.values():
        assert figures.resources.spilled <= SPILL_BYTES, figures


def test_warps_use_the_sectors_that_they_ask_for(kernels: dict[str, Figures]) -> None:
    for figures in kernels.values():
        assert figures.sectors >= SECTORS, figures


@pytest.mark.parametrize("name", FLOOR)
def test_a_pass_moves_little_more_than_its_inputs_and_outputs(passes: dict[str, list[Figures]], name: str) -> None:
    once, each = bytes_of(passes[name])
    assert FLOOR[name] <= once <= each <= OVER_THE_FLOOR * FLOOR[name]
    assert len(passes[name]) == LAUNCHES


def test_a_forward_pass_needs_none_of_torchs_kernels() -> None:
    assert torch_launches(tssa_passes(1, 64, 12, 64, True)["forward"]) == 0


def test_the_page_has_them_all(kernels: dict[str, Figures]) -> None:
    page = FILE.read_text()
    assert [name for name in kernels if f"| `{name}` |" not in page] == []
