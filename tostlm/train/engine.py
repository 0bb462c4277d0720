"""DeepSpeed, and nothing of it elsewhere: starting the engine, one step, the model's whole weights."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import torch
import torch.distributed as dist
from torch import Tensor

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it looked for a GPU in vain

import deepspeed
from deepspeed.ops.op_builder import ShareMemCommBuilder
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from tostlm.config import RunConfig, batches
from tostlm.errors import UserError, reason_of
from tostlm.launch import Ranks
from tostlm.model import LM, parameter_groups
from tostlm.train.feed import Rows

SHARDS = "shards"  # DeepSpeed's tag
SETTINGS = ("betas", "eps", "weight_decay")  # of an optimizer group
SMALLEST_DISK_BYTES = 1 << 20  # less is called full

# DeepSpeed calls collectives by names that torch deprecates, once a collective.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


def deepspeed_dict(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: its own block as it is, and the batch sizes derived from tokens."""
    shares = batches(config, world_size)
    # A group that splits sequences over its ranks reads the same ones on each: DeepSpeed counts them once a rank, and
    # asks for micro-batch x accumulation x ranks.
    return {
        **config.deepspeed,
        "train_batch_size": shares.sequences * config.train.context_ranks,
        "train_micro_batch_size_per_gpu": shares.micro_sequences,
        "gradient_accumulation_steps": shares.accumulation,
        "steps_per_print": config.deepspeed.get("steps_per_print", config.train.steps + 1),
    }


def join_ranks(ranks: Ranks) -> torch.device:
    """Meet the other ranks; returns this rank's device."""
    if torch.cuda.is_available():  # a launcher may show each rank its own GPU alone
        own = ranks.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(own)
        os.environ["LOCAL_RANK"] = str(own)  # DeepSpeed chooses by it
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Training never calls the shared-memory all-reduce that DeepSpeed would compile for a minute at the first start.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    return torch.device(deepspeed.get_accelerator().current_device_name())


def context_group(context_ranks: int) -> dist.ProcessGroup | None:
    """The `context_ranks` neighbouring ranks that share their sequences, this one among them; every rank must call.

    DeepSpeed averages gradients over all ranks, whatever they share: that is right here too. A rank's backward pass
    gives its parameters' share in the losses of its whole group, so the ranks' shares add up to the gradient of the sum
    of all ranks' losses, and the loss of a step is their mean.
    """
    return dist.new_subgroups(context_ranks)[0] if context_ranks > 1 else None


def start_engine(config: RunConfig, lm: LM, ranks: Ranks) -> Any:
    """A DeepSpeed engine around the model and AdamW.

    Raises:
        UserError: DeepSpeed refuses its block of the config.
    """
    optimizer = torch.optim.AdamW(
        parameter_groups(lm, config.optimizer.weight_decay),
        lr=0.0,  # each step sets it
        betas=config.optimizer.betas,
        eps=config.optimizer.eps,
        fused=torch.cuda.is_available(),
    )
    prepare_blocks(lm, config)
    try:
        engine, *_ = deepspeed.initialize(
            model=lm,
            optimizer=optimizer,
            config=deepspeed_dict(config, ranks.world),
            dist_init_required=False,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, DeepSpeedConfigError, ZeRORuntimeException) as error:
        if ranks.rank:  # it refuses on all ranks; one of them says so
            raise SystemExit(2) from None
        raise UserError(f"DeepSpeed refuses the deepspeed block: {_complaint(error)}") from error
    for state in optimizer.state.values():
        # At stage 0 in low precision DeepSpeed makes the optimizer's state by a step on zero gradients, which Adam's
        # bias correction would count.
        state["step"].zero_()
    return engine


def prepare_blocks(lm: LM, config: RunConfig) -> None:
    """Have the blocks computed again in the backward pass, and compiled, as the config says."""
    lm.recompute_every = config.train.activation_checkpointing_every
    if config.train.compile:
        for block in lm.blocks:
            block.compile()


def _complaint(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, p['loc']))}={p['input']!r}: {p['msg']}" for p in error.errors())
    return " ".join(str(error).split())


class Step(NamedTuple):
    """What one update was like."""

    loss: Tensor  # mean over this rank's tokens, in nats
    grad_norm: Tensor | float | None  # of the whole gradient, before clipping; None where DeepSpeed is told not to


def train_step(engine: Any, rows: Rows, lr: float, group: dist.ProcessGroup | None = None) -> Step:
    """One update from this rank's share of a step; `group` shares its sequences."""
    for settings in engine.optimizer.param_groups:
        settings["lr"] = lr
    passes = rows.split(engine.gradient_accumulation_steps())
    losses = []
    grad_norm = None
    for number, micro in enumerate(passes, start=1):
        loss = micro.loss(engine, group)
        engine.backward(loss)
        if number == len(passes):
            grad_norm = _unreported_grad_norm(engine)
        engine.step()
        losses.append(loss.detach())
    return Step(torch.stack(losses).mean(), engine.get_global_grad_norm() if grad_norm is None else grad_norm)


def _unreported_grad_norm(engine: Any) -> Tensor | None:
    """The gradient's norm where DeepSpeed leaves it out: at stage 0 in fp32, once the ranks' gradients are averaged."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def save_engine(engine: Any, folder: Path) -> None:
    """Write every rank's shards under `folder`; every rank must call.

    Raises:
        OSError: they cannot be written.
    """
    try:
        engine.save_checkpoint(str(folder), tag=SHARDS, save_latest=False)
    except RuntimeError as error:  # torch's writer keeps the system's reason to itself
        full = shutil.disk_usage(folder).free < SMALLEST_DISK_BYTES
        raise OSError(errno.ENOSPC if full else errno.EIO, os.strerror(errno.ENOSPC) if full else str(error)) from error


def load_engine(engine: Any, folder: Path) -> None:
    """Read what `save_engine` wrote; the optimizer's settings stay the config's, not those it was saved with.

    Raises:
        UserError: it cannot be read.
    """
    settings = [{key: group[key] for key in SETTINGS} for group in engine.optimizer.param_groups]
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=SHARDS)
    except (RuntimeError, OSError, EOFError, AssertionError, LookupError, pickle.UnpicklingError) as error:
        raise UserError(f"{folder} cannot be read: {reason_of(error)}") from None
    if loaded is None:
        raise UserError(f"{folder} holds no shards")
    for group, own in zip(engine.optimizer.param_groups, settings, strict=True):
        group.update(own)


def whole_weights(engine: Any, rank: int) -> dict[str, Tensor]:
    """The model's weights on the CPU of rank 0, gathered from all ranks (every rank must call); empty elsewhere."""
    partitioned = engine.zero_optimization_partition_weights()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        gathered = deepspeed.zero.GatheredParameters([parameter]) if partitioned else nullcontext()
        with gathered:
            if rank == 0:
                weights[name] = parameter.detach().cpu().clone()
    return weights
