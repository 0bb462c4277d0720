"""Accelerators that models are trained on: what one of them computes, holds and moves, from its maker's data sheet."""

from __future__ import annotations

from typing import NamedTuple

import torch

GIB = 1 << 30


class Accelerator(NamedTuple):
    """One GPU as sold for servers, or one core of a CPU. Rates are its data sheet's: no program reaches all of them."""

    chip: str  # what torch's name of the device contains
    bf16_flops: float  # dense operations a second, in bf16 with fp32 sums
    fp32_flops: float  # in fp32 itself: torch uses TF32 only where a program asks for it
    memory_bytes: int | None  # None where programs share it
    bytes_per_second: float  # between memory and chip
    link: float  # bytes a second to the other accelerators of its node, in one direction
    network: float  # bytes a second to those of other nodes: a network card of 400 Gb/s for each, if not said otherwise
    watts: float  # at full load, without its host

    def peak(self, dtype: torch.dtype) -> float:
        """Return the operations a second in fp32, or in a narrower dtype, each as fast as bf16."""
        return self.fp32_flops if dtype == torch.float32 else self.bf16_flops


# By the names that users give. A data sheet's links are the sum of both directions, its memory is in GiB.
ACCELERATORS = {
    # nvidia.com/en-us/data-center/a100, A100 80GB SXM; four cards of 200 Gb/s for eight GPUs are usual with it
    "a100-80gb": Accelerator("A100", 312e12, 19.5e12, 80 * GIB, 2.039e12, 300e9, 25e9, 400),
    "a100-40gb": Accelerator("A100", 312e12, 19.5e12, 40 * GIB, 1.555e12, 300e9, 25e9, 400),
    # nvidia.com/en-us/data-center/h100, H100 SXM: dense is half of the sparse figure
    "h100-80gb": Accelerator("H100", 989e12, 67e12, 80 * GIB, 3.35e12, 450e9, 50e9, 700),
    # nvidia.com/en-us/data-center/h200, H200 SXM
    "h200-141gb": Accelerator("H200", 989e12, 67e12, 141 * GIB, 4.8e12, 450e9, 50e9, 700),
    # DGX B200 data sheet, an eighth of it
    "b200-180gb": Accelerator("B200", 2250e12, 75e12, 180 * GIB, 8e12, 900e9, 50e9, 1000),
    # nvidia.com/en-us/data-center/l40s; PCIe 4.0 x16
    "l40s-48gb": Accelerator("L40S", 362e12, 91.6e12, 48 * GIB, 0.864e12, 32e9, 25e9, 350),
    # amd.com/en/products/accelerators/instinct/mi300/mi300x
    "mi300x-192gb": Accelerator("MI300X", 1307e12, 163.4e12, 192 * GIB, 5.3e12, 448e9, 50e9, 750),
    # A core of 2.5 GHz with one unit of AVX-512 for fused multiplications, of a socket with 8 channels of DDR5
    "cpu": Accelerator("", 80e9, 80e9, None, 10e9, 10e9, 3e9, 10),
}


class Cluster(NamedTuple):
    """Nodes of equal accelerators, of which each is one rank's."""

    nodes: int
    per_node: int
    device: Accelerator

    @property
    def ranks(self) -> int:
        """The number of accelerators."""
        return self.nodes * self.per_node


def accelerator_of(name: str) -> Accelerator | None:
    """Return the accelerator that torch's name of a GPU means, of its chip any; None if it is not listed."""
    return next((each for each in ACCELERATORS.values() if each.chip and each.chip in name), None)
