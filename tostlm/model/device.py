"""Where a model runs when nobody says where."""

from __future__ import annotations

import torch


def best_device() -> torch.device:
    """This machine's GPU, or its CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
