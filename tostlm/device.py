"""The device that models run on by default: its name, what it can compute in, and its peak."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from tostlm.accelerators import accelerator_of
from tostlm.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def best_device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def parse_device(name: str) -> torch.device:
    """Return the device that a user names.

    Raises:
        UserError: there is no such device.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"there is no device {name} here; use cpu, or leave it out for {best_device()}") from None
    return device


def parse_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name, fp32, bf16 or fp16; raise a UserError for others."""
    if name not in DTYPES:
        raise UserError(f"dtype {name} is not known; it is one of {', '.join(DTYPES)}")
    return DTYPES[name]


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


def peak_flops(device: torch.device) -> float | None:
    """Return the peak of a GPU in dense bf16 operations per second; None for a CPU and for GPUs that are not listed."""
    found = accelerator_of(device_name(device)) if device.type == "cuda" else None
    return None if found is None else found.bf16_flops
