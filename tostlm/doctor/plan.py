"""The config against the ranks and devices it meets: shares, precision, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tostlm.config import RunConfig, batch_plan
from tostlm.doctor.devices import Device
from tostlm.doctor.finding import FAIL, OK, WARN, Finding, amount, named
from tostlm.errors import UserError
from tostlm.model import count_parameters


def parameters(config: RunConfig) -> int:
    """All of the model's, its position table too."""
    return count_parameters(config.model) + (config.model.positions or 0) * config.model.width


def weight_bytes(config: RunConfig) -> int:
    """Bytes of the weights as they are trained and saved."""
    return parameters(config) * (2 if config.precision in ("bf16", "fp16") else 4)


def memory_bytes(config: RunConfig, world_size: int) -> float:
    """What the model takes of a rank between steps: weights, gradients, and AdamW's fp32 moments and weights.

    ZeRO shares out the optimizer from stage 1, the gradients from 2, the weights from 3 (Rajbhandari et al. 2020,
    arXiv 1910.02054). Activations come on top.
    """
    count, weights, stage = parameters(config), weight_bytes(config), config.zero_stage
    optimizer = count * (8 if weights == 4 * count else 12)
    shares = [world_size if stage >= first else 1 for first in (3, 2, 1)]
    return sum(part / share for part, share in zip((weights, weights, optimizer), shares, strict=True))


def judge(config: RunConfig, devices: Sequence[Device], hosts: Sequence[str]) -> Finding:
    """Whether these ranks can run the config."""
    world_size = len(devices)
    try:
        shares = batch_plan(config, world_size)
    except UserError as error:
        return Finding("config", FAIL, str(error))
    unable = [rank for rank, device in enumerate(devices) if not device.suits]
    if unable:
        lacking = f"precision is {config.precision}, which {named(unable, hosts)} cannot multiply in"
        return Finding("config", FAIL, lacking, "train in fp32, or on other devices")
    measured = (
        f"{shares.sequences} sequences a step, {shares.accumulation} passes of a rank; {config.precision}, "
        f"ZeRO stage {config.zero_stage}"
    )
    if any(key.startswith("offload_") for key in config.deepspeed.get("zero_optimization", {})):
        return Finding("config", OK, measured)
    on_host, need = Counter(hosts), memory_bytes(config, world_size)
    has = min(
        device.memory_bytes / (on_host[host] if device.kind == "cpu" else 1)
        for device, host in zip(devices, hosts, strict=True)
    )
    measured += f"; model and optimizer take {amount(need, 'B')} of {amount(has, 'B')} a rank"
    if need > has:
        return Finding("config", WARN, measured, "raise the ZeRO stage, start more ranks or offload the optimizer")
    return Finding("config", OK, measured)
