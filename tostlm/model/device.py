"""The device that a model runs on by default, its name and what it can compute in."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the vendor's name of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def supports_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a device multiplies matrices in a dtype natively; torch emulates bf16 elsewhere, slowly."""
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype != torch.float16  # which DeepSpeed refuses there
