"""The sizes of a run's model: parameters, and the bytes of weights, optimizer and checkpoints."""

from __future__ import annotations

import torch

from tostlm.checkpoint.layout import weights_dtype
from tostlm.config import RunConfig, matmul_dtype
from tostlm.device import DTYPES
from tostlm.model import count_parameters, hidden_matrices, weight_shapes


def total_parameters(config: RunConfig) -> int:
    """Return the number of the model's parameters, position embeddings included."""
    return count_parameters(config.model) + (config.model.positions or 0) * config.model.width


def autocast_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype that torch.autocast computes products in; None without autocast."""
    return matmul_dtype(config) if config.precision.startswith("autocast") else None


def gradient_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype in which gradients are summed over micro-batches."""
    chosen = config.deepspeed.get("data_types", {}).get("grad_accum_dtype")
    return weights_dtype(config) if chosen is None else DTYPES[chosen]


def weight_bytes(config: RunConfig) -> int:
    """Return the bytes of the weights in the dtype in which they are trained and saved."""
    return total_parameters(config) * weights_dtype(config).itemsize


def moment_bytes(config: RunConfig) -> int:
    """Return the bytes of the optimizer's moments, in fp32, over all ranks.

    AdamW has two moments of each parameter, Muon one of each matrix.
    """
    shapes = weight_shapes(config.model)
    matrices = hidden_matrices(config.model) if config.optimizer.name == "muon" else ()
    return 4 * (2 * total_parameters(config) - sum(shapes[name].numel() for name in matrices))


def average_bytes(config: RunConfig) -> int:
    """Return the bytes of the moving average of the weights, in fp32, over all ranks; 0 where the run has none."""
    return 4 * total_parameters(config) if config.train.ema_decay is not None else 0


def checkpoint_bytes(config: RunConfig) -> int:
    """Return the bytes of one checkpoint: the optimizer's state, fp32 weights, and the file of weights alone."""
    weights = weight_bytes(config) if config.train.save_weights else 0
    return moment_bytes(config) + average_bytes(config) + 4 * total_parameters(config) + weights
