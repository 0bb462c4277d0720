"""DeepSpeed as training sees it: starting the engine, one step. Its insides are in engine_state.py."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, NamedTuple, NoReturn

import deepspeed
import pydantic
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import ShareMemCommBuilder
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor

from tostlm.config import RunConfig, batch_plan
from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.launch import RankInfo
from tostlm.model import LM, parameter_groups
from tostlm.train.batches import Batch
from tostlm.train.carry import RecurrentState

Phase = Callable[[str], AbstractContextManager[None]]  # around a part of a step, by its name

# The ranks wait in a collective while rank 0 verifies the data, which may be hours of reading; DeepSpeed's own ten
# minutes would end them. Once training has begun the watchdog is sooner.
COLLECTIVE_TIMEOUT = timedelta(days=1)

# DeepSpeed calls collectives by names that torch deprecates, once a collective.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


def deepspeed_dict(config: RunConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration: its own block as it is, and the batch sizes derived from tokens."""
    shares = batch_plan(config, world_size)
    # A group that splits sequences over its ranks reads the same ones on each: DeepSpeed counts them once a rank, and
    # asks for micro-batch x accumulation x ranks.
    return {
        **config.deepspeed,
        "train_batch_size": shares.sequences * config.train.context_parallel_size,
        "train_micro_batch_size_per_gpu": shares.micro_sequences,
        "gradient_accumulation_steps": shares.accumulation,
        "steps_per_print": config.deepspeed.get("steps_per_print", config.train.steps + 1),
    }


def init_distributed(ranks: RankInfo) -> torch.device:
    """Meet the other ranks; returns this rank's device."""
    if torch.cuda.is_available():  # a launcher may show each rank its own GPU alone
        own = ranks.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(own)
        os.environ["LOCAL_RANK"] = str(own)  # DeepSpeed chooses by it
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Training never calls the shared-memory all-reduce that DeepSpeed would compile for a minute at the first start.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return torch.device(deepspeed.get_accelerator().current_device_name())


def context_group(context_parallel_size: int) -> dist.ProcessGroup | None:
    """The neighbouring ranks that share their sequences, this one among them; every rank must call.

    DeepSpeed averages gradients over all ranks, whatever they share: that is right here too. A rank's backward pass
    gives its parameters' share in the losses of its whole group, so the ranks' shares add up to the gradient of the sum
    of all ranks' losses, and the loss of a step is their mean.
    """
    return dist.new_subgroups(context_parallel_size)[0] if context_parallel_size > 1 else None


def start_engine(config: RunConfig, lm: LM, ranks: RankInfo) -> Any:
    """A DeepSpeed engine around the model and AdamW.

    Raises:
        UserError: DeepSpeed refuses its block of the config, or checkpoints would not hold all of the engine's state.
    """
    if key := _beyond_checkpoints(config):
        _refuse(f"{key} keeps state where checkpoints do not reach; use device: cpu there, and only that", ranks)
    prepare_blocks(lm, config)
    try:
        optimizer = _adamw(config, lm)
        engine, *_ = deepspeed.initialize(
            model=lm,
            optimizer=optimizer,
            config=deepspeed_dict(config, ranks.world_size),
            dist_init_required=False,
        )
    except (ValueError, TypeError, AssertionError, RuntimeError, DeepSpeedConfigError, ZeRORuntimeException) as error:
        _refuse(f"DeepSpeed refuses the deepspeed block: {_complaint(error)}", ranks)
    engine.guard = StepGuard(engine, optimizer)
    for state in optimizer.state.values():
        # At stage 0 in low precision DeepSpeed makes the optimizer's state by a step on zero gradients, which Adam's
        # bias correction would count.
        state["step"].zero_()
    return engine


def prepare_blocks(lm: LM, config: RunConfig) -> None:
    """Have the blocks computed again in the backward pass, and compiled, as the config says."""
    lm.activation_checkpointing_every = config.train.activation_checkpointing_every
    if config.train.compile:
        for block in lm.blocks:
            block.compile()


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


def _refuse(message: str, ranks: RankInfo) -> NoReturn:
    """End all ranks, which all come here, with one message."""
    if ranks.rank:
        raise SystemExit(EXIT_USER_ERROR) from None
    raise UserError(message) from None


def _complaint(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, p['loc']))}={p['input']!r}: {p['msg']}" for p in error.errors())
    return " ".join(str(error).split())


class StepGuard:
    """Stands before the optimizer's update, and keeps that of a bad step from being made.

    DeepSpeed's optimizers know the whole gradient's norm when they come to the update; some refuse one that is no
    number themselves, some do not.
    """

    def __init__(self, engine: Any, optimizer: torch.optim.Optimizer) -> None:
        self._engine, self._update = engine, optimizer.step
        self.closed = False  # to the step under way
        self.refused = False  # the last update that DeepSpeed came with
        optimizer.step = self._step  # type: ignore[method-assign]

    def _step(self, *arguments: Any, **options: Any) -> Any:
        self.refused = self.closed or not _is_number(getattr(self._engine.optimizer, "_global_grad_norm", None))
        return None if self.refused else self._update(*arguments, **options)


def _is_number(grad_norm: Tensor | float | None) -> bool:
    """Whether a gradient's norm is one, as far as it is known; DeepSpeed writes -1 for a norm that is none."""
    return grad_norm is None or 0 <= float(grad_norm) < math.inf


class StepResult(NamedTuple):
    """What one step was like."""

    loss: float  # mean over all ranks' tokens, in nats
    grad_norm: float | None  # of the whole gradient, before clipping; None where DeepSpeed is told not to
    bad: bool  # by its loss, or by its gradient where no loss scale explains that
    skipped: bool  # nothing was updated
    stop: bool  # some rank was asked to stop


def train_step(
    engine: Any,
    rows: Batch,
    lr: float,
    is_bad: Callable[[float], bool],
    stop: bool,
    carry: RecurrentState,
    phase: Phase,
) -> StepResult:
    """One update from this rank's share of a step, unless the step is bad: by its loss, or by its gradient's norm.

    A state that is carried on is forgotten where the update is not made.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    parts = rows.split(engine.gradient_accumulation_steps())
    losses = []
    for number, part in enumerate(parts):
        if number:
            with phase("backward"):
                engine.step()  # counts the pass before
        with phase("forward"):
            loss, state = part.loss(engine, carry[number])
        carry.keep(number, state)
        losses.append(loss.detach())
        with phase("backward"):
            engine.backward(loss)
    with phase("step"):
        mean, stop = all_reduce_mean(torch.stack(losses).mean(), stop)
        step = _update(engine, mean, is_bad(mean), stop)
    if step.skipped:
        carry.forget()
    return step


def _update(engine: Any, loss: float, bad: bool, stop: bool) -> StepResult:
    """Take the step that the gradients are ready for, unless it is bad."""
    norm: Tensor | float | None = _unreported_grad_norm(engine)
    engine.guard.closed, engine.guard.refused = bad or not _is_number(norm), True  # unless DeepSpeed comes to it
    engine.step()
    skipped = engine.guard.refused
    if norm is None:
        norm = engine.get_global_grad_norm()
    if norm is not None:
        norm = float(norm) if _is_number(norm) else math.inf
    return StepResult(loss, norm, bad or (skipped and not engine.fp16_enabled()), skipped, stop)


def all_reduce_mean(loss: Tensor, stop: bool = False) -> tuple[float, bool]:
    """The mean of the ranks' losses, and whether any of them was asked to stop: the same on every rank."""
    sums = torch.stack([loss.double(), torch.tensor(float(stop), dtype=torch.float64, device=loss.device)])
    dist.all_reduce(sums)
    total, stops = sums.tolist()
    return total / dist.get_world_size(), stops > 0


def learning_rates(engine: Any) -> dict[str, float]:
    """Of each optimizer group, by its name."""
    return {group["name"]: group["lr"] for group in engine.optimizer.param_groups}


def _unreported_grad_norm(engine: Any) -> Tensor | None:
    """The gradient's norm where DeepSpeed leaves it out: at stage 0 in fp32, once the ranks' gradients are averaged."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
