"""Checks of the ranks' devices: one for each rank, of the same kind, with correct and equally fast matrix products."""

from __future__ import annotations

import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tostlm.device import best_device, device_name, supports_matmul
from tostlm.doctor.findings import MAX_NAMED_RANKS, Finding, find_minority, format_quantity, format_ranks, unhealthy

GEMM_SHAPES = ((64, 96, 32), (257, 129, 65), (512, 768, 256))  # rows, inner, columns of the products that are checked
TIMED_SIDE = {"cpu": 512, "cuda": 8192}  # of the square matrices that are timed
WINDOWS, WINDOW_SECONDS = 6, 0.25
SLOW_FRACTION = 0.7  # of the median speed; a rank below it is unhealthy


class Device(NamedTuple):
    """The device that a rank computes on."""

    kind: str  # cuda or cpu
    name: str  # of the product
    memory_bytes: int  # of the GPU, or of the host
    supports_dtype: bool  # multiplies in the run's dtype
    uuid: str  # of the GPU, whatever its index; "" for a CPU
    visible_gpus: int  # that the rank sees


def measure_device(dtype: torch.dtype) -> Device:
    """Return this rank's current device, for a run that multiplies matrices in `dtype`."""
    device = best_device()
    supports_dtype = supports_matmul(device, dtype)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        uuid, visible = str(properties.uuid), torch.cuda.device_count()
        return Device("cuda", properties.name, properties.total_memory, supports_dtype, uuid, visible)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", device_name(device), memory, supports_dtype, "", 0)


def check_devices(devices: Sequence[Device], hosts: Sequence[str]) -> Finding:
    """Check that every rank has a device of its own, all of the same kind."""
    minority, usual = find_minority([device.kind for device in devices])
    if minority:
        reason = f"on {devices[minority[0]].name}, the others on {devices[usual].name}"
        return unhealthy("devices", minority, hosts, reason, "find out why the driver does not see the GPUs")
    uuids = [device.uuid for device in devices]
    for uuid in filter(None, uuids):
        if uuids.count(uuid) > 1:
            ranks = [rank for rank, other in enumerate(uuids) if other == uuid]
            remedy = "start no more ranks on a host than it has GPUs"
            return Finding("devices", "FAIL", f"{format_ranks(ranks, hosts)} share the GPU {uuid}", remedy)
    minority, usual = find_minority([device.name for device in devices])
    if minority:
        measured = f"{format_ranks(minority, hosts)}: {devices[minority[0]].name}, elsewhere {devices[usual].name}"
        return Finding("devices", "warn", measured, "all ranks run at the pace of the slowest")
    ranks_on = Counter(hosts)
    idle = [rank for rank, device in enumerate(devices) if device.visible_gpus > ranks_on[hosts[rank]]]
    if idle:
        host = hosts[idle[0]]
        measured = f"{host} has {devices[idle[0]].visible_gpus} GPUs and {ranks_on[host]} ranks"
        return Finding("devices", "warn", measured, "start a rank for each GPU")
    return Finding("devices", "ok", f"{len(devices)} x {devices[0].name} on {', '.join(ranks_on)}")


class Gemm(NamedTuple):
    """A rank's matrix products."""

    dtype: str  # of the products that were timed, the run's
    worst_error: float  # the largest error of an element, as a fraction of what rounding may cause
    deterministic: bool  # repeated products had the same bits
    flops: float  # floating-point operations per second


def measure_gemm(dtype: torch.dtype) -> Gemm:
    """Multiply matrices on this rank's device, on all ranks at once, as ranks of a host share its cores and power.

    The speed is that of the best of `WINDOWS` windows of a fixed time, so that a short disturbance does not count.
    """
    device = best_device()
    generator = torch.Generator().manual_seed(0)
    dtypes = {torch.float32, dtype}
    worst = float(np.max([_gemm_error(shape, kind, device, generator) for shape in GEMM_SHAPES for kind in dtypes]))
    side = TIMED_SIDE[device.type]
    a, b = (torch.randn(side, side, generator=generator).to(device, dtype) for _ in range(2))
    first = torch.matmul(a, b)
    flops, deterministic = 0.0, True
    for _ in range(WINDOWS):
        start, products = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < WINDOW_SECONDS:
            again = torch.matmul(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize()
            products += 1
        flops = max(flops, 2 * side**3 * products / seconds)
        deterministic = deterministic and torch.equal(first, again)
    return Gemm(str(dtype).removeprefix("torch."), worst, deterministic, flops)


def _gemm_error(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> float:
    """Return the largest error of a product's elements against numpy in float64, as a fraction of its bound.

    The bound is n u |A| |B| for a sum of n products in fp32 (Higham 2002, Accuracy and Stability of Numerical
    Algorithms, section 3.5), plus some roundings to the result's dtype, in which GPUs add up partial sums.
    """
    rows, inner, columns = shape
    a, b = (torch.randn(size, generator=generator).to(dtype) for size in ((rows, inner), (inner, columns)))
    product = _to_float64(torch.matmul(a.to(device), b.to(device)))
    exact, magnitude = _to_float64(a) @ _to_float64(b), np.abs(_to_float64(a)) @ np.abs(_to_float64(b))
    bound = (inner * torch.finfo(torch.float32).eps + 4 * torch.finfo(dtype).eps) * magnitude
    return float(np.max(np.abs(product - exact) / bound))


def _to_float64(x: Tensor) -> npt.NDArray[np.float64]:
    array: npt.NDArray[np.float64] = x.cpu().double().numpy()
    return array


def combine_gemms(rounds: Sequence[Gemm]) -> Gemm:
    """Return several measurements of one rank as one: the best speed and the worst errors."""
    worst = float(np.max([gemm.worst_error for gemm in rounds]))
    return Gemm(rounds[0].dtype, worst, all(gemm.deterministic for gemm in rounds), max(gemm.flops for gemm in rounds))


def check_gemms(gemms: Sequence[Gemm], hosts: Sequence[str]) -> list[Finding]:
    """Check that all ranks compute correctly and at the same speed; return one finding, or one for each problem."""
    wrong = [rank for rank, gemm in enumerate(gemms) if not (gemm.deterministic and gemm.worst_error <= 1)]
    speeds = [gemm.flops for gemm in gemms]
    median = statistics.median(speeds)
    slow = [rank for rank, speed in enumerate(speeds) if speed < SLOW_FRACTION * median]
    findings = []
    if wrong:
        first = gemms[wrong[0]]
        reason = f"matrix products are off by {first.worst_error:.3g} times what rounding can cause"
        if first.worst_error <= 1:
            reason = "repeating a matrix product gives other bits"
        findings.append(unhealthy("gemm", wrong, hosts, reason))
    if slow:
        fractions = ", ".join(f"{speeds[rank] / median:.2f}" for rank in slow[:MAX_NAMED_RANKS])
        reason = f"{fractions} of the median {format_quantity(median, 'FLOP/s')} {gemms[0].dtype}"
        findings.append(unhealthy("gemm", slow, hosts, reason))
    slowest, fastest = (format_quantity(speed, "FLOP/s") for speed in (min(speeds), max(speeds)))
    spread = f"{slowest} ({format_ranks([speeds.index(min(speeds))], hosts)}) to {fastest}"
    return findings or [Finding("gemm", "ok", f"correct and deterministic; {gemms[0].dtype} {spread}")]
