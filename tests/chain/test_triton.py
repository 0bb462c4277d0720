"""The kernels of a chain: in Triton's interpreter and on a GPU, and what the compiler makes of them."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

from tests.triton_kernels import SPILL_BYTES, chain_launches, compiled, parity, resources

FILE = "tests/chain/triton_parity.py"


def test_parity_in_the_interpreter() -> None:
    parity(FILE, in_interpreter=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_parity_on_a_gpu() -> None:
    parity(FILE)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("D", "V"), [(64, 64), (128, 128), (256, 768), (512, 768)])
def test_kernels_compile_without_spilling(D: int, V: int, capability: int) -> None:
    found = chain_launches(2, 64, D, V)
    spills = [(launch.name, resources(compiled(launch, capability)).spilled) for launch in found]
    assert len(spills) == 3
    assert max(bytes for _, bytes in spills) <= SPILL_BYTES, spills
