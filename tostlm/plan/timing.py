"""How long a step takes, by a roofline: what an accelerator computes and moves, at a share of its data sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from tostlm.accelerators import Cluster
from tostlm.config import RunConfig, batch_plan, matmul_dtype
from tostlm.errors import UserError
from tostlm.model import training_flops_per_token
from tostlm.plan.communication import Traffic, seconds
from tostlm.plan.sizes import total_parameters


class Rates(NamedTuple):
    """What is known or reckoned with of a cluster beside its data sheets."""

    products: float = 0.55  # the share of the peak that large matrix products reach on GPUs
    memory: float = 0.8  # the share of the memory's rate that kernels which stream reach
    network: float = 0.7  # the share of the links' rate that a ring of NCCL's reaches
    tokens_per_second: float | None = None  # of a rank's passes, where they were measured
    price: float | None = None  # of an hour of one GPU
    storage: float = 2e9  # bytes a second that checkpoints are written with


class StepTime(NamedTuple):
    """Seconds of a step by what takes them, one after the other."""

    products: float  # matrix products, recomputed ones too
    streaming: float  # what blocks read and write beside them
    optimizer: float
    communication: float  # that no computation hides

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self)


def step_time(config: RunConfig, traffic: Traffic, cluster: Cluster, activation_bytes: int, rates: Rates) -> StepTime:
    """Return how long a step takes.

    Args:
        activation_bytes: that a micro-batch keeps for its backward pass: each is written, read and met by a gradient.
    """
    device, passes = cluster.device, batch_plan(config, cluster.ranks).accumulation
    bytes_per_second = device.bytes_per_second * rates.memory
    tokens, streaming = passes * config.train.micro_batch_tokens, 0.0
    if rates.tokens_per_second is None:
        flops = training_flops_per_token(config.model, config.data.context_tokens) * _with_recomputation(config)
        products = tokens * flops / (device.peak(matmul_dtype(config)) * rates.products)
        streaming = 3 * passes * activation_bytes / bytes_per_second
    else:
        products = tokens / rates.tokens_per_second
    # Gradient, weight and two moments are read; weight, moments and the model's own weight are written.
    updated = 8 * 4 * total_parameters(config) / (cluster.ranks if config.zero_stage else 1)
    hidden = 2 / 3 * (products + streaming) if _overlaps(config) else 0.0  # behind the backward pass
    waits = max(0.0, seconds(traffic, cluster) / rates.network - hidden)
    return StepTime(products, streaming, updated / bytes_per_second, waits)


def _with_recomputation(config: RunConfig) -> float:
    """Return the operations of a step by those without activation checkpointing, which repeats passes forward."""
    every = config.train.activation_checkpointing_every
    return 1 + (config.model.depth // every / config.model.depth / 3 if every else 0)


def _overlaps(config: RunConfig) -> bool:
    """Return whether DeepSpeed communicates while the backward pass goes on: by default at stage 3 alone."""
    overlaps = config.deepspeed.get("zero_optimization", {}).get("overlap_comm")
    return config.zero_stage == 3 if overlaps is None else bool(overlaps)


def measured_rate(bench: Path, names: tuple[str, ...], context: int) -> float:
    """Return the tokens per second of passes that `tostlm bench train --out FILE` measured, at the nearest context.

    Args:
        bench: the file.
        names: under which the file may have the model.
        context: in tokens.

    Raises:
        UserError: the file is not there or is no such file, or it has no such model.
    """
    try:
        rates = json.loads(bench.read_text())["rates"]
        found = {rate["context"]: rate["pass_tokens_per_second"] for rate in rates if rate["model"] in names}
        found = {context: float(rate) for context, rate in found.items() if rate is not None}
        known = sorted({str(rate["model"]) for rate in rates})
    except OSError as error:
        raise UserError(f"--bench {bench} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"--bench {bench} is no file of `tostlm bench train --out`") from None
    if not found:
        raise UserError(f"--bench {bench} has no rate of {names[0]}; it has {', '.join(known) or 'none at all'}")
    return float(found[min(found, key=lambda measured: abs(measured - context))])
