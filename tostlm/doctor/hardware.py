"""Checks of the ranks' devices: one for each rank, of the same kind, with correct and equally fast matrix products."""

from __future__ import annotations

import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from tostlm.config import RunConfig, matmul_dtype
from tostlm.device import best_device, device_name, supports_matmul
from tostlm.doctor.findings import Finding, Speed, find_minority, format_list, format_quantity, format_ranks, unhealthy
from tostlm.launch import RankInfo

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


def measure_device(config: RunConfig, rank_info: RankInfo) -> Device:
    """Return this rank's current device."""
    device = best_device()
    supports_dtype = supports_matmul(device, matmul_dtype(config))
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
    if idle := [rank for rank, device in enumerate(devices) if device.visible_gpus > ranks_on[hosts[rank]]]:
        host = hosts[idle[0]]
        measured = f"{host} has {devices[idle[0]].visible_gpus} GPUs and {ranks_on[host]} ranks"
        return Finding("devices", "warn", measured, "start a rank for each GPU")
    return Finding("devices", "ok", f"{len(devices)} x {devices[0].name} on {', '.join(ranks_on)}")


def measure_gemm(config: RunConfig, rank_info: RankInfo) -> Speed:
    """Multiply matrices on this rank's device, on all ranks at once, as ranks of a host share its cores and power.

    The speed is that of the best of `WINDOWS` windows of a fixed time, so that a short disturbance does not count.
    """
    device, dtype = best_device(), matmul_dtype(config)
    error = gemm_error(device, dtype)
    side = TIMED_SIDE[device.type]
    generator = torch.Generator().manual_seed(0)
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
    if not error <= 1:  # it may be NaN
        return Speed(flops, f"matrix products are off by {error:.3g} times what rounding can cause")
    return Speed(flops, "" if deterministic else "repeating a matrix product gives other bits")


def gemm_error(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest error of products in fp32 and in a dtype against numpy in float64, as a fraction of its bound.

    The bound is n u |A| |B| for a sum of n products in fp32 (Higham 2002, Accuracy and Stability of Numerical
    Algorithms, section 3.5), plus some roundings to the result's dtype, in which GPUs add up partial sums.
    """
    generator = torch.Generator().manual_seed(0)
    errors = []
    for (rows, inner, columns), kind in itertools.product(GEMM_SHAPES, {torch.float32, dtype}):
        a, b = (torch.randn(size, generator=generator).to(kind) for size in ((rows, inner), (inner, columns)))
        product = torch.matmul(a.to(device), b.to(device)).double().numpy(force=True)
        exact_a, exact_b = a.double().numpy(), b.double().numpy()
        rounding = inner * torch.finfo(torch.float32).eps + 4 * torch.finfo(kind).eps
        bound = rounding * (np.abs(exact_a) @ np.abs(exact_b))
        errors.append(np.max(np.abs(product - exact_a @ exact_b) / bound))
    return float(np.max(errors))


def check_gemms(dtype: torch.dtype, gemms: Sequence[Speed], hosts: Sequence[str]) -> list[Finding]:
    """Check that all ranks compute correctly and, in `dtype`, equally fast; return one finding, or all problems."""
    name = str(dtype).removeprefix("torch.")
    speeds = [gemm.per_second for gemm in gemms]
    median = statistics.median(speeds)
    findings = []
    if wrong := [rank for rank, gemm in enumerate(gemms) if gemm.fault]:
        findings.append(unhealthy("gemm", wrong, hosts, gemms[wrong[0]].fault))
    if slow := [rank for rank, speed in enumerate(speeds) if speed < SLOW_FRACTION * median]:
        fractions = format_list([f"{speeds[rank] / median:.2f}" for rank in slow])
        reason = f"{fractions} of the median {format_quantity(median, 'FLOP/s')} {name}"
        findings.append(unhealthy("gemm", slow, hosts, reason))
    slowest, fastest = (format_quantity(speed, "FLOP/s") for speed in (min(speeds), max(speeds)))
    spread = f"{slowest} ({format_ranks([speeds.index(min(speeds))], hosts)}) to {fastest}"
    return findings or [Finding("gemm", "ok", f"correct and deterministic; {name} {spread}")]
