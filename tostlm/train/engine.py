"""DeepSpeed as training sees it: starting the engine, one step. Its insides are in engine_state.py."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any, NamedTuple, NoReturn

import pydantic
import torch
from torch import Tensor

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it looked for a GPU in vain

import deepspeed
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import ShareMemCommBuilder
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException

from tostlm.config import RunConfig, batches
from tostlm.errors import UserError
from tostlm.launch import Ranks
from tostlm.model import LM, parameter_groups
from tostlm.train.feed import Rows

# DeepSpeed calls collectives by names that torch deprecates, once a collective.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


def deepspeed_dict(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: its own block as it is, and the batch sizes derived from tokens."""
    shares = batches(config, world_size)
    return {
        **config.deepspeed,
        "train_batch_size": shares.sequences,
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


def start_engine(config: RunConfig, lm: LM, ranks: Ranks) -> Any:
    """A DeepSpeed engine around the model and AdamW.

    Raises:
        UserError: DeepSpeed refuses its block of the config, or checkpoints would not hold all of the engine's state.
    """
    if key := _beyond_checkpoints(config):
        _refuse(f"{key} keeps state where checkpoints do not reach; use device: cpu there, and only that", ranks)
    try:
        optimizer = _adamw(config, lm)
        engine, *_ = deepspeed.initialize(
            model=lm,
            optimizer=optimizer,
            config=deepspeed_dict(config, ranks.world),
            dist_init_required=False,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, DeepSpeedConfigError, ZeRORuntimeException) as error:
        _refuse(f"DeepSpeed refuses the deepspeed block: {_complaint(error)}", ranks)
    for state in optimizer.state.values():
        # At stage 0 in low precision DeepSpeed makes the optimizer's state by a step on zero gradients, which Adam's
        # bias correction would count.
        state["step"].zero_()
    return engine


def _adamw(config: RunConfig, lm: LM) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups = parameter_groups(lm, settings.weight_decay)
    common: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}  # each step sets the rate
    if _offload(config, "optimizer").get("device") == "cpu":
        return DeepSpeedCPUAdam(groups, **common)  # which DeepSpeed compiles with g++ at the first start
    return torch.optim.AdamW(groups, **common, fused=torch.cuda.is_available())


def _beyond_checkpoints(config: RunConfig) -> str | None:
    """The key, if any is set, that has DeepSpeed keep state elsewhere than engine_state.py looks."""
    for what in ("optimizer", "param"):
        block, key = _offload(config, what), f"deepspeed.zero_optimization.offload_{what}"
        if block.get("device") == "nvme":
            return f"{key}.device=nvme"
        if block.get("ratio", 1) != 1:
            return f"{key}.ratio={block['ratio']}"
        if block.get("super_offload"):
            return f"{key}.super_offload=true"
    return None


def _offload(config: RunConfig, what: str) -> dict[str, Any]:
    block = config.deepspeed.get("zero_optimization", {}).get(f"offload_{what}")
    return block if isinstance(block, dict) else {}


def _refuse(message: str, ranks: Ranks) -> NoReturn:
    """End all ranks, which all come here, with one message."""
    if ranks.rank:
        raise SystemExit(2) from None
    raise UserError(message) from None


def _complaint(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, p['loc']))}={p['input']!r}: {p['msg']}" for p in error.errors())
    return " ".join(str(error).split())


class Step(NamedTuple):
    """What one update was like."""

    loss: Tensor  # mean over this rank's tokens, in nats
    grad_norm: Tensor | float | None  # of the whole gradient, before clipping; None where DeepSpeed is told not to


def train_step(engine: Any, rows: Rows, lr: float) -> Step:
    """One update from this rank's share of a step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    passes = rows.split(engine.gradient_accumulation_steps())
    losses = []
    grad_norm = None
    for number, micro in enumerate(passes, start=1):
        loss = micro.loss(engine)
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
