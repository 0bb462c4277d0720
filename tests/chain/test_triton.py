"""The kernels of a chain: in Triton's interpreter and on a GPU, and what the compiler makes of them."""

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'tostlm[triton]'")

from tests.triton_kernels import SPILL_BYTES, parity, recorded_launches, spilled
from tostlm.chain import triton as kernels

FILE = "tests/chain/triton_parity.py"


def test_parity_in_the_interpreter() -> None:
    parity(FILE, in_interpreter=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_parity_on_a_gpu() -> None:
    parity(FILE)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("D", "V"), [(64, 64), (128, 128), (256, 768), (512, 768)])
def test_kernels_compile_without_spilling(D: int, V: int, capability: int) -> None:
    B, N, H, L = 1, 2, 1, 64
    own, reads, ends, kept, added = (torch.zeros(B, N, H, *shape) for shape in ((L, V), (L, D), (D, L), (D, 1), (D, V)))
    first = torch.zeros(B, H, D, V)
    with recorded_launches() as found:
        kernels.chain(added, kept, first, False)
        kernels.chain(added.double(), kept.double(), first.double(), False)
        kernels.delta_chain(own, reads, ends, kept, added, first, True)
    spills = [(kernel.__name__, spilled(kernel, arguments, capability)) for kernel, arguments in found]
    assert len(spills) == 3
    assert max(bytes for _, bytes in spills) <= SPILL_BYTES, spills
