"""One device a rank, of one kind everywhere, and none left over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from tostlm.doctor.finding import FAIL, OK, WARN, Finding, minority, named, unfit
from tostlm.model import best_device, device_name, supports_matmul


class Device(NamedTuple):
    """What a rank computes on."""

    kind: str  # cuda or cpu
    name: str
    memory_bytes: int  # of a GPU, or of the host
    suits: bool  # it multiplies in what the run does
    identity: str  # of a GPU, the same whatever it is numbered; "" of a CPU
    visible: int  # GPUs that the rank sees


def measure(dtype: torch.dtype) -> Device:
    """This rank's device, the current one where there are several, for a run that multiplies in `dtype`."""
    device = best_device()
    suits = supports_matmul(device, dtype)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        identity, visible = str(properties.uuid), torch.cuda.device_count()
        return Device("cuda", properties.name, properties.total_memory, suits, identity, visible)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", device_name(device), memory, suits, "", 0)


def judge(devices: Sequence[Device], hosts: Sequence[str]) -> Finding:
    """Whether every rank has a device of its own, all alike."""
    odd, usual = minority([device.kind for device in devices])
    if odd:
        why = f"on {devices[odd[0]].name}, the others on {devices[usual].name}"
        return unfit("devices", odd, hosts, why, "see why the driver does not find the GPUs")
    of_gpu: dict[str, list[int]] = {}
    for rank, device in enumerate(devices):
        of_gpu.setdefault(device.identity, []).append(rank)
    for identity, ranks in of_gpu.items():
        if identity and len(ranks) > 1:
            way_out = "start no more ranks on a host than it has GPUs"
            return Finding("devices", FAIL, f"{named(ranks, hosts)} share the GPU {identity}", way_out)
    odd, usual = minority([device.name for device in devices])
    if odd:
        differing = f"{named(odd, hosts)}: {devices[odd[0]].name}, elsewhere {devices[usual].name}"
        return Finding("devices", WARN, differing, "the slowest sets the pace of all")
    ranks_on = Counter(hosts)
    idle = [rank for rank, device in enumerate(devices) if device.visible > ranks_on[hosts[rank]]]
    if idle:
        more = f"{hosts[idle[0]]} has {devices[idle[0]].visible} GPUs and {ranks_on[hosts[idle[0]]]} ranks"
        return Finding("devices", WARN, more, "start a rank for each GPU")
    return Finding("devices", OK, f"{len(devices)} x {devices[0].name} on {', '.join(ranks_on)}")
