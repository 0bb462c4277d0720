"""Where a model runs when nobody says where, and what that is called."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def best_device() -> torch.device:
    """This machine's GPU, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """A device as its vendor calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())


def supports_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a device has the means to multiply matrices in a dtype: torch would emulate bf16, slowly."""
    if device.type == "cuda":
        return dtype != torch.bfloat16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype != torch.float16  # which DeepSpeed refuses there
