"""DeepSpeed as training uses it: joining the ranks, starting the engine, one step. Its state is read in checkpoint/."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

import deepspeed
import pydantic
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder, ShareMemCommBuilder
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.zero.utils import ZeRORuntimeException
from torch import Tensor, nn
from torch.utils.cpp_extension import get_default_build_root

from tostlm.checkpoint.deepspeed_state import DeepSpeedEngine, matrix_shards, optimized_tensors, share_weights
from tostlm.checkpoint.layout import weights_dtype
from tostlm.config import BatchPlan, RunConfig, zero_block
from tostlm.errors import EXIT_LOST_RANK, EXIT_USER_ERROR, UserError, is_lost_peer, report
from tostlm.launch import RankInfo
from tostlm.model import LM, LMState, create_lm, hidden_matrices, parameter_groups
from tostlm.optim import Muon, MuonRule, WeightAverage
from tostlm.train.batches import Batch, RecurrentState

T = TypeVar("T")
Timer = Callable[[str], AbstractContextManager[None]]  # times the code inside as a phase of the given name

REJECTIONS = (  # of a config, by DeepSpeed
    *(ValueError, TypeError, AssertionError, NotImplementedError, DeepSpeedConfigError, ZeRORuntimeException),
)

# The ranks wait in a collective while rank 0 checks the data, which may take hours of reading. DeepSpeed's default of
# ten minutes would end them. During training the watchdog acts sooner.
COLLECTIVE_TIMEOUT = timedelta(days=1)

# DeepSpeed calls collectives by names that torch deprecates, which would warn at every call.
warnings.filterwarnings("ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor)", category=FutureWarning)


class TrainingEngine(DeepSpeedEngine, Protocol):
    """A DeepSpeed engine that `start_engine` prepared for training."""

    guard: StepGuard


class StepResult(NamedTuple):
    """The outcome of one training step, equal on all ranks."""

    loss: float  # mean over the tokens of all ranks, in nats
    grad_norm: float | None  # of the whole gradient before clipping; None where DeepSpeed computes none
    bad: bool  # the loss is bad, or the gradient is not finite and no loss scale explains it
    skipped: bool  # no parameter was updated
    stop: bool  # at least one rank was asked to stop


def init_distributed(ranks: RankInfo) -> torch.device:
    """Join the process group of the run and return this rank's device."""
    if torch.cuda.is_available():  # a launcher may make only its own GPU visible to each rank
        index = ranks.local_rank % torch.cuda.device_count()
        torch.cuda.set_device(index)
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed selects its device by it
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(_is_news)
    # Training never calls the shared-memory all-reduce that DeepSpeed would compile for a minute at the first start.
    deepspeed.ops.__compatible_ops__[ShareMemCommBuilder.NAME] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=COLLECTIVE_TIMEOUT)
    return torch.device(deepspeed.get_accelerator().current_device_name())


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a message of DeepSpeed tells a user something: it warns of every optimizer but its own."""
    return "untested optimizer" not in str(record.msg)


def broadcast_from_rank0(function: Callable[[], T], ranks: RankInfo) -> T:
    """Call `function` on rank 0 and return its result on every rank. Every rank must call this.

    Raises:
        SystemExit: on the other ranks, if `function` failed on rank 0, which raises the error itself:
            `EXIT_USER_ERROR` if that is a UserError, else `EXIT_LOST_RANK`.
    """
    message: list[tuple[T] | int] = [EXIT_LOST_RANK]
    if ranks.rank == 0:
        try:
            message = [(function(),)]
        except BaseException as error:
            message = [EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_LOST_RANK]
            with suppress(RuntimeError):  # a peer that is gone does not need the message
                dist.broadcast_object_list(message, src=0)
            raise
    dist.broadcast_object_list(message, src=0)
    if isinstance(message[0], int):
        raise SystemExit(message[0])
    return message[0][0]


def rank0_first(function: Callable[[], T], ranks: RankInfo) -> T:
    """Call `function` on every rank, on rank 0 first, so that an error all ranks would raise is reported once.

    Raises:
        SystemExit: on the other ranks, if `function` failed on rank 0; see `broadcast_from_rank0`.
    """
    results: list[T] = []
    broadcast_from_rank0(lambda: results.append(function()), ranks)
    return results[0] if results else function()


def context_parallel_group(size: int) -> dist.ProcessGroup | None:
    """Return the group of `size` neighbouring ranks that split their sequences; None for size 1. Every rank must call.

    DeepSpeed averages gradients over all ranks, whether or not they share sequences, which is right here too: a rank's
    backward pass gives its share in the gradient of the summed losses of its whole group.
    """
    if size == 1:
        return None
    group: dist.ProcessGroup = dist.new_subgroups(size)[0]
    return group


def deepspeed_dict(config: RunConfig, plan: BatchPlan) -> dict[str, Any]:
    """Return DeepSpeed's configuration: the `deepspeed` block of the config with what it leaves out.

    That is batch sizes, derived from tokens, and at ZeRO stage 3 the sizes of buffers, derived from the model.
    """
    # DeepSpeed requires micro-batch x accumulation x ranks, and so counts a sequence once for each rank of its group.
    return {
        **config.deepspeed,
        "zero_optimization": zero_block(config.deepspeed, config.model),
        "train_batch_size": plan.sequences * config.train.context_parallel_size,
        "train_micro_batch_size_per_gpu": plan.micro_sequences,
        "gradient_accumulation_steps": plan.accumulation,
        "steps_per_print": config.deepspeed.get("steps_per_print", config.train.steps + 1),
        # It knows AdamW, and not what is derived from it.
        **({} if config.optimizer.name == "adamw" else {"zero_allow_untested_optimizer": True}),
    }


def start_engine(config: RunConfig, plan: BatchPlan, ranks: RankInfo) -> TrainingEngine:
    """Return a DeepSpeed engine around the config's model, initialized by its seed, and AdamW.

    At ZeRO stage 3 no rank ever holds the whole model.

    Raises:
        UserError: on rank 0, if DeepSpeed rejects the `deepspeed` block on these ranks. The others raise SystemExit
            with `EXIT_USER_ERROR`.
        RuntimeError: a peer was lost or memory ran out.
    """
    settings = deepspeed_dict(config, plan)
    try:
        lm = _create_lm(config, settings)
        optimizer = _create_optimizer(config, lm, ranks)
        engine: TrainingEngine = deepspeed.initialize(
            model=lm, optimizer=optimizer, config=settings, dist_init_required=False
        )[0]
    except REJECTIONS as error:
        if is_lost_peer(error):
            raise
        _reject(f"DeepSpeed rejects the deepspeed block: {_one_line(error)}", ranks)
    share_weights(engine)
    if isinstance(optimizer, Muon):
        optimizer.bind(matrix_shards(engine, hidden_matrices(config.model, config.optimizer.muon.split_heads)))
    decay = config.train.ema_decay
    engine.weight_average = None if decay is None else WeightAverage(decay, optimized_tensors(engine))
    engine.guard = StepGuard(engine, optimizer)
    for state in optimizer.state.values():
        # At stage 0 in low precision DeepSpeed creates the optimizer's state by a step on zero gradients, which Adam's
        # bias correction would count.
        if "step" in state:
            state["step"].zero_()
    return engine


def _create_lm(config: RunConfig, settings: dict[str, Any]) -> LM:
    """Return the config's model, at ZeRO stage 3 partitioned over the ranks layer by layer."""

    def partition(part: nn.Module) -> None:
        # DeepSpeed takes parameters in the dtype it computes in. It makes the group of hpZeRO once.
        deepspeed.zero.Init(
            module=part.to(dtype),
            config_dict_or_path=settings,
            zero_param_parallel_group=deepspeed.utils.groups._get_zero_param_intra_parallel_group(),
        )

    dtype = weights_dtype(config)
    lm = create_lm(config.model, config.seed, partition if config.zero_stage == 3 else None)
    prepare_blocks(lm, config)
    return lm


def prepare_blocks(lm: LM, config: RunConfig) -> None:
    """Set up activation checkpointing and compilation of the model's blocks as the config says."""
    lm.activation_checkpointing_every = config.train.activation_checkpointing_every
    if config.train.compile:
        for block in lm.blocks:
            block.compile()


def _create_optimizer(config: RunConfig, lm: LM, ranks: RankInfo) -> torch.optim.Optimizer:
    settings = config.optimizer
    common: dict[str, Any] = {"lr": 0.0, "betas": settings.betas, "eps": settings.eps}  # each step sets the rate
    matrices = hidden_matrices(config.model) if settings.name == "muon" else ()
    groups = parameter_groups(lm, settings.weight_decay, matrices, settings.rules)
    if matrices:
        rule = MuonRule(**settings.muon.model_dump(exclude={"split_heads"}))
        return Muon(groups, rule, **common, fused=torch.cuda.is_available())
    if not config.optimizer_on_cpu:
        return torch.optim.AdamW(groups, **common, fused=torch.cuda.is_available())
    if not ranks.local_rank and (lock := _build_lock()).exists():
        waits = "DeepSpeed's CPU Adam is being built by another process"
        report(f"{waits}; if none is, one was killed: remove {lock}, and start again")
    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(groups, **common)
    except RuntimeError as error:  # DeepSpeed compiles it with g++ at the first start
        _reject(f"offload_optimizer needs DeepSpeed's CPU Adam, which cannot be built here: {_one_line(error)}", ranks)
    return optimizer


def _build_lock() -> Path:
    """Return the file that torch makes while it compiles DeepSpeed's CPU Adam, and for which others wait for ever."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()
    return Path(root, CPUAdamBuilder().name, "lock")


def _reject(message: str, ranks: RankInfo) -> NoReturn:
    """End all ranks, each of which found the same error, with one message."""
    if ranks.rank:
        raise SystemExit(EXIT_USER_ERROR) from None
    raise UserError(message) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, pydantic.ValidationError):
        return "; ".join(f"{'.'.join(map(str, p['loc']))}={p['input']!r}: {p['msg']}" for p in error.errors())
    return " ".join(str(error).split())


class StepGuard:
    """Wraps the optimizer's update, so that the update of a bad step is skipped on every rank.

    DeepSpeed's optimizers know the norm of the whole gradient when they call the update. Some of them skip an update
    whose gradient is not finite themselves, some do not.
    """

    def __init__(self, engine: TrainingEngine, optimizer: torch.optim.Optimizer) -> None:
        self._engine, self._optimizer, self._update = engine, optimizer, optimizer.step
        self.skip = False  # skip the update of the current step
        self.skipped = False  # the last update was skipped
        self.around_update: Callable[[], AbstractContextManager[None]] = nullcontext  # what measures it
        optimizer.step = self._step  # type: ignore[method-assign]

    def _step(self, *arguments: Any, **options: Any) -> Any:
        self.skipped = self.skip or not _is_finite(getattr(self._engine.optimizer, "_global_grad_norm", None))
        if self.skipped:
            return None
        with self.around_update():
            result = self._update(*arguments, **options)
        if self._engine.weight_average is not None:
            self._engine.weight_average.update(gradients(self._optimizer))
        return result


def gradients(optimizer: torch.optim.Optimizer) -> dict[Tensor, Tensor]:
    """Return the gradients of the tensors that an update changes; ZeRO may set those of one group at a time."""
    owners = (owner for group in optimizer.param_groups for owner in group["params"])
    return {owner: owner.grad for owner in owners if owner.grad is not None}


def _is_finite(grad_norm: Tensor | float | None) -> bool:
    """Return whether a gradient norm, as far as it is known, is finite; DeepSpeed writes -1 for one that is not."""
    return grad_norm is None or 0 <= float(grad_norm) < math.inf


def compute_loss(model: LM | DeepSpeedEngine, batch: Batch, state: LMState | None = None) -> tuple[Tensor, LMState]:
    """Return the mean loss of this rank's batch in nats, and the model's state after it; `state` is that before it."""
    loss, after = model(
        batch.inputs, state, targets=batch.targets, document_start_mask=batch.document_start_mask, group=batch.group
    )
    return loss, after


def train_step(
    engine: TrainingEngine,
    micro_batches: Sequence[Batch],
    lr: float,
    is_bad: Callable[[float], bool],
    stop: bool,
    recurrent_state: RecurrentState,
    timer: Timer,
) -> StepResult:
    """Make one update from this rank's micro-batches, unless the step is bad. Every rank must call this.

    The micro-batches start from `recurrent_state`, which is replaced by the states after them, or reset if the update
    is skipped.

    Args:
        is_bad: decides from the mean loss over all ranks whether to skip the update.
        stop: whether this rank was asked to stop.
        timer: times the phases forward, backward and step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    losses = []
    accumulate(engine, len(micro_batches))
    for index, batch in enumerate(micro_batches):
        if index:
            with timer("backward"):
                engine.step()  # DeepSpeed counts the micro-batch before; it updates at the last one alone
        engine.set_gradient_accumulation_boundary(index + 1 == len(micro_batches))
        with timer("forward"):
            loss, state = compute_loss(engine, batch, recurrent_state.states[index])
        recurrent_state.store(index, state)
        losses.append(loss.detach())
        with timer("backward"):
            engine.backward(loss)
    with timer("step"):
        own_loss = torch.stack(losses).mean()
        sums = torch.stack([own_loss, torch.full_like(own_loss, stop)]).double()
        dist.all_reduce(sums)  # from here on all ranks know the same
        loss_sum, stops = sums.tolist()
        mean_loss = loss_sum / dist.get_world_size()
        bad = is_bad(mean_loss)
        norm: Tensor | float | None = _grad_norm_at_stage0(engine)
        engine.guard.skip = bad or not _is_finite(norm)
        engine.guard.skipped = True  # unless DeepSpeed calls the update: it may skip the step itself
        engine.step()
        skipped = engine.guard.skipped
        norm = engine.get_global_grad_norm() if norm is None else norm
        if norm is not None:
            norm = float(norm) if _is_finite(norm) else math.inf
    if skipped:
        recurrent_state.reset()
    return StepResult(mean_loss, norm, bad or (skipped and not engine.fp16_enabled()), skipped, stops > 0)


@contextmanager
def evaluating(engine: DeepSpeedEngine) -> Iterator[None]:
    """Set the model up for evaluation, and for training again afterwards. Every rank must enter and leave."""
    engine.eval()
    try:
        yield
    finally:
        engine.train()
        # At ZeRO stage 3 a pass forward fetches weights ahead for the next one. Saving would meet them in flight.
        if engine.zero_optimization_partition_weights():
            engine.empty_partition_cache()


def accumulate(engine: DeepSpeedEngine, passes: int) -> None:
    """Let the next update be of the mean of so many gradients."""
    if engine.gradient_accumulation_steps() != passes:
        engine.set_train_batch_size(passes * engine.train_micro_batch_size_per_gpu() * dist.get_world_size())


def _grad_norm_at_stage0(engine: TrainingEngine) -> Tensor | None:
    """Return the norm of the averaged gradient at stage 0 in fp32, where DeepSpeed computes none; None elsewhere."""
    if engine.zero_optimization_stage() or engine.bfloat16_enabled() or engine.fp16_enabled():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
