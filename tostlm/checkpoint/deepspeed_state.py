"""A DeepSpeed engine's training state by parameter: fp32 master weights and moments, at every ZeRO stage.

The stages lay these out differently: one tensor per parameter, flat tensors, or flat tensors partitioned over the
ranks. Here each parameter's fragment on this rank is found, once for all stages.

DeepSpeed's own accessors do not serve all of them: `safe_get_full_*` and `safe_set_full_*` do nothing at stage 0, fail
for moments before the first step, and need whole tensors on every rank; `safe_get_local_*` and `safe_set_local_*` exist
at stage 3 alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.model import LM
from tostlm.optim import EMA, MOMENTUM, ROW_SQUARES, MatrixShard, Muon, WeightAverage

ADAM_KINDS, MUON_KINDS = ("weight", "exp_avg", "exp_avg_sq"), ("weight", MOMENTUM)
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's names


class DeepSpeedOptimizer(Protocol):
    """The part that is used here of the optimizers around which DeepSpeed builds an engine."""

    param_groups: list[dict[str, Any]]

    def update_lp_params(self) -> None: ...  # at ZeRO stages 1 and 2 alone


class Stage3Optimizer(DeepSpeedOptimizer, Protocol):
    """The part of DeepSpeed's `DeepSpeedZeroOptimizer_Stage3` that is used here."""

    grad_position: dict[int, tuple[int, int, int]]  # by parameter id: group, offset in its flat tensor, elements
    fp16_groups: list[list[Tensor]]
    fp16_partitioned_groups_flat: list[Tensor | None]  # None where they are on NVMe
    fp32_partitioned_groups_flat: list[Tensor]

    def get_param_id(self, param: Tensor) -> int: ...
    def checkpoint_event_prologue(self) -> None: ...
    def checkpoint_event_epilogue(self) -> None: ...
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group_id: int) -> None: ...


class DeepSpeedEngine(Protocol):
    """The part of `deepspeed.DeepSpeedEngine` that tostlm uses; DeepSpeed itself has no type annotations."""

    module: LM
    optimizer: DeepSpeedOptimizer
    basic_optimizer: torch.optim.Optimizer  # AdamW or Muon itself, which `optimizer` wraps under ZeRO
    weight_average: WeightAverage | None  # tostlm's own; None where the run has none
    torch_autocast_z0_gradscaler: torch.amp.GradScaler | None
    device: torch.device
    global_steps: int
    global_samples: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
    def backward(self, loss: Tensor) -> Any: ...
    def step(self) -> Any: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def destroy(self) -> None: ...

    def train_batch_size(self) -> int: ...
    def train_micro_batch_size_per_gpu(self) -> int: ...
    def gradient_accumulation_steps(self) -> int: ...
    def set_train_batch_size(self, train_batch_size: int) -> None: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...
    def fp16_enabled(self) -> bool: ...
    def bfloat16_enabled(self) -> bool: ...
    def zero_optimization(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_optimization_partition_weights(self) -> bool: ...
    def empty_partition_cache(self) -> None: ...


class Fragment(NamedTuple):
    """The part of a flattened parameter that lies in this rank's optimizer; it may have no elements."""

    elements: range  # of the parameter
    owner: Tensor  # the tensor that Adam updates and has its state by
    offset: int  # of the first element, in `owner`


def state_keys(engine: DeepSpeedEngine, name: str) -> list[str]:
    """Return the keys of a parameter's master weight and moments in a checkpoint: NAME/KIND."""
    return [f"{name}/{kind}" for kind in _kinds(engine, name)]


def _kinds(engine: DeepSpeedEngine, name: str) -> tuple[str, ...]:
    optimizer = engine.basic_optimizer
    is_matrix = isinstance(optimizer, Muon) and name in optimizer.matrices
    rows = (ROW_SQUARES,) if isinstance(optimizer, Muon) and name in optimizer.row_squares else ()
    average = () if engine.weight_average is None else (EMA,)
    return (*(MUON_KINDS if is_matrix else ADAM_KINDS), *rows, *average)


def matrix_shards(engine: DeepSpeedEngine, matrices: Mapping[str, int]) -> list[MatrixShard]:
    """Return where the matrices lie that Muon updates, of which each is made of so many. Every rank must call this."""
    parameters = {name: p for name, p in engine.module.named_parameters() if name in matrices}
    fragments = {name: fragment_of(engine, parameter) for name, parameter in parameters.items()}
    of_ranks: list[dict[str, range]] = [{}] * dist.get_world_size()
    dist.all_gather_object(of_ranks, {name: fragment.elements for name, fragment in fragments.items()})
    shards = []
    for name, fragment in fragments.items():
        rows, columns = full_shape(parameters[name])
        elements = tuple(of_rank[name] for of_rank in of_ranks)
        shards.append(MatrixShard(name, (rows, columns), matrices[name], fragment.owner, fragment.offset, elements))
    return shards


def state_numels(engine: DeepSpeedEngine) -> dict[str, int]:
    """Return the number of elements of each parameter by name, in the model's order."""
    return {name: full_shape(parameter).numel() for name, parameter in engine.module.named_parameters()}


def state_elements(engine: DeepSpeedEngine) -> dict[str, range]:
    """Return which elements of each flattened tensor NAME/KIND lie in this rank's optimizer."""
    elements: dict[str, range] = {}
    for name, parameter in engine.module.named_parameters():
        own = fragment_of(engine, parameter).elements
        rows = range(full_shape(parameter)[0])
        elements |= {f"{name}/{kind}": rows if kind == ROW_SQUARES else own for kind in _kinds(engine, name)}
    return elements


@torch.no_grad()
def gather_state(engine: DeepSpeedEngine, rank_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Return host copies, by NAME/KIND, of the states of the parameters whose `rank_of` is this rank.

    They are in fp32 and have the parameters' shapes. Every rank must call this, and holds one more full tensor at a
    time.

    Raises:
        UserError: see `check_fragments`.
    """
    check_fragments(engine)
    gathered = {}
    partitioned = engine.zero_optimization()
    for name, parameter in engine.module.named_parameters():
        own = rank_of[name] == dist.get_rank()
        fragment = fragment_of(engine, parameter)
        for kind in _kinds(engine, name) if own or partitioned else ():
            if kind == ROW_SQUARES:  # which every rank has whole
                if own:
                    gathered[f"{name}/{kind}"] = _view(engine, name, fragment, kind).to("cpu", copy=True)
                continue
            full = torch.zeros(full_shape(parameter).numel(), dtype=torch.float32, device=engine.device)
            full[fragment.elements.start : fragment.elements.stop] = _view(engine, name, fragment, kind)
            if partitioned:
                # One rank has each element, the others zero bits: their sum as integers is exact, even for -0.0.
                dist.reduce(full.view(torch.int32), dst=rank_of[name])
            if own:
                gathered[f"{name}/{kind}"] = full.view(full_shape(parameter)).cpu()
    return gathered


@torch.no_grad()
def restore_state(engine: DeepSpeedEngine, fragments: Iterable[tuple[str, Tensor]], optimizer_steps: int) -> None:
    """Write a training state into the engine. Every rank must call this.

    `fragments` are, of each flattened tensor NAME/KIND, the elements that `state_elements` returns on this rank;
    `optimizer_steps` are the updates that Adam's bias correction counts.

    Raises:
        UserError: see `check_fragments`.
    """
    parameters = dict(engine.module.named_parameters())
    with _rewritten_masters(engine):
        for key, elements in fragments:
            name, _, kind = key.rpartition("/")
            _view(engine, name, fragment_of(engine, parameters[name]), kind).copy_(elements)
    for owner in _owners_of_adam(engine):
        state = _state(engine, owner)
        step = state["step"]  # DeepSpeed's CPU Adam counts in an int, torch's in a tensor
        state["step"] = torch.full_like(step, optimizer_steps) if isinstance(step, Tensor) else optimizer_steps
    if isinstance(engine.basic_optimizer, DeepSpeedCPUAdam):
        _repeat_bias_corrections(engine.basic_optimizer, optimizer_steps)
    check_fragments(engine)


@contextmanager
def averaged_weights(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let the model compute with the moving average of its weights. Every rank must call this."""
    average = engine.weight_average
    assert average is not None
    with _rewritten_masters(engine):
        average.exchange()
    yield
    with _rewritten_masters(engine):
        average.exchange()


@contextmanager
def _rewritten_masters(engine: DeepSpeedEngine) -> Iterator[None]:
    """Let the model compute with what is written inside to the optimizer's master weights."""
    if stage3 := _stage3(engine):
        stage3.checkpoint_event_prologue()  # partitions the parameters that are kept whole; the epilogue gathers them
    yield
    with torch.no_grad():
        if stage3:
            for group in range(len(stage3.fp16_groups)):
                stage3._reassign_or_swap_out_partitioned_parameters(group)
            stage3.checkpoint_event_epilogue()
        elif engine.zero_optimization():
            engine.optimizer.update_lp_params()
        else:
            for parameter, master in _master_copies(engine):
                parameter.copy_(master)


def _repeat_bias_corrections(adam: DeepSpeedCPUAdam, steps: int) -> None:
    """Bring DeepSpeed's CPU Adam to the powers of beta that it has after `steps` updates, by updates of nothing.

    It multiplies them up from update to update. After a jump it takes the power itself, whose last bits differ.
    """
    (beta1, beta2), nothing = adam.param_groups[0]["betas"], [torch.zeros(1) for _ in range(4)]
    for step in range(1, steps + 1):
        adam.ds_opt_adam.adam_update(adam.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing)


@torch.no_grad()
def check_fragments(engine: DeepSpeedEngine) -> None:
    """Check that the fragments of the master weights, rounded, are what the model computes with. Every rank must call.

    Where the fragments lie is DeepSpeed's own knowledge, and an option of it may change that unseen: a checkpoint would
    then hold parameters that are mixed up, and the run that saved it would resume from it all the same.

    Raises:
        UserError: on rank 0, if they are not on any rank. The other ranks raise SystemExit with `EXIT_USER_ERROR`.
    """
    misplaced = []
    for name, parameter in engine.module.named_parameters():
        fragment = fragment_of(engine, parameter)
        if _stage3(engine):
            own = parameter.ds_tensor.view(-1)[: len(fragment.elements)]  # type: ignore[attr-defined]
        else:
            own = parameter.view(-1)[fragment.elements.start : fragment.elements.stop]
        if not torch.equal(_view(engine, name, fragment, "weight").to(own), own):
            misplaced.append(name)
    everywhere = torch.tensor(len(misplaced), device=engine.device)
    if dist.get_world_size() > 1:
        dist.all_reduce(everywhere)
    if not everywhere:
        return
    if dist.get_rank():
        raise SystemExit(EXIT_USER_ERROR)
    raise UserError(
        f"the master weights of DeepSpeed's optimizer ({', '.join(misplaced[:3]) or 'on another rank'}) are not where "
        "tostlm reads them: some option of the deepspeed block moves them; leave out what your run does not need. "
        "Nothing was saved"
    )


def share_weights(engine: DeepSpeedEngine) -> None:
    """Let the fp32 masters of ZeRO stage 3 be the weights themselves where those are in fp32, on the same device.

    DeepSpeed means to do so, but compares a device with its name, and keeps a copy.
    """
    stage3 = _stage3(engine)
    for weights, masters in (
        zip(stage3.fp16_partitioned_groups_flat, optimized_tensors(engine), strict=True) if stage3 else ()
    ):
        if weights is not None and (weights.dtype, weights.device) == (masters.dtype, masters.device):
            masters.data = weights.data


def optimizer_steps(engine: DeepSpeedEngine) -> int:
    """Return the number of updates that Adam has made."""
    return int(_state(engine, _owners_of_adam(engine)[0])["step"])


def loss_scale(engine: DeepSpeedEngine) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale; None if there is none."""
    if grad_scaler := _grad_scaler(engine):
        return dict(grad_scaler.state_dict())
    if scaler := _loss_scaler(engine):
        return {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}
    return None


def restore_loss_scale(engine: DeepSpeedEngine, values: Mapping[str, float] | None) -> None:
    """Restore the state that `loss_scale` returned, also at another ZeRO stage; None changes nothing."""
    if values is None:
        return
    if grad_scaler := _grad_scaler(engine):
        grad_scaler.load_state_dict(dict(values))
    elif scaler := _loss_scaler(engine):
        for key, value in values.items():
            if hasattr(scaler, key):  # stage 0 has no hysteresis
                setattr(scaler, key, value)


def gather_weights(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """Return host copies of the model's weights in its own dtype on rank 0, {} elsewhere. Every rank must call this."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if _stage3(engine) else nullcontext():
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def full_shape(parameter: Tensor) -> torch.Size:
    """Return a parameter's shape, at ZeRO stage 3 too."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties parameters between uses
    return shape


def fragment_of(engine: DeepSpeedEngine, parameter: Tensor) -> Fragment:
    """Return where this rank's part of a parameter lies in its optimizer."""
    numel = full_shape(parameter).numel()
    if stage3 := _stage3(engine):
        group, offset, share = stage3.grad_position[stage3.get_param_id(parameter)]
        start = min(numel, share * dist.get_rank())  # the last shares are padded
        return Fragment(range(start, min(numel, start + share)), stage3.fp32_partitioned_groups_flat[group], offset)
    if engine.zero_optimization():
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # deepspeed.utils.tensor_fragment
        if mapping is None:
            return Fragment(range(0), _group_owner(engine, parameter), 0)
        (owner,) = engine.optimizer.param_groups[mapping.param_group_index]["params"]
        start, offset = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
        return Fragment(range(start, start + mapping.lp_fragment_address.numel), owner, offset)
    master = next((master for weight, master in _master_copies(engine) if weight is parameter), parameter)
    return Fragment(range(numel), master, 0)


def _group_owner(engine: DeepSpeedEngine, parameter: Tensor) -> Tensor:
    """Return the tensor that this rank's optimizer has for a parameter's group, at ZeRO stages 1 and 2."""
    optimizer: Any = engine.optimizer
    groups = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    index = next(index for index, group in enumerate(groups) if any(other is parameter for other in group))
    owner: Tensor = optimizer.param_groups[index]["params"][0]
    return owner


def _stage3(engine: DeepSpeedEngine) -> Stage3Optimizer | None:
    return cast(Stage3Optimizer, engine.optimizer) if engine.zero_optimization_partition_weights() else None


def _master_copies(engine: DeepSpeedEngine) -> Iterable[tuple[Tensor, Tensor]]:
    """Return pairs of a parameter and its fp32 master copy at stage 0; there are none if the model is fp32 itself."""
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        for groups in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(*groups, strict=True)


def optimized_tensors(engine: DeepSpeedEngine) -> list[Tensor]:
    """Return the tensors that this rank's optimizer updates."""
    if stage3 := _stage3(engine):
        return stage3.fp32_partitioned_groups_flat
    return [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]


def _view(engine: DeepSpeedEngine, name: str, fragment: Fragment, kind: str) -> Tensor:
    """Return a flat view of a fragment's elements in the engine, to read or to write; of a state of rows, all."""
    if kind == ROW_SQUARES:
        rows: Tensor = cast(Muon, engine.basic_optimizer).row_squares[name]
        return rows
    if kind == EMA:
        assert engine.weight_average is not None
        tensor = engine.weight_average.of(fragment.owner)
    else:
        tensor = fragment.owner.detach() if kind == "weight" else _state(engine, fragment.owner)[kind]
    return tensor.view(-1)[fragment.offset : fragment.offset + len(fragment.elements)]


def _owners_of_adam(engine: DeepSpeedEngine) -> list[Tensor]:
    return [owner for owner in optimized_tensors(engine) if "step" in _state(engine, owner)]


def _state(engine: DeepSpeedEngine, owner: Tensor) -> dict[str, Any]:
    """Return the optimizer's state of a tensor; before its first step, created as that step would."""
    optimizer = engine.basic_optimizer
    state: dict[str, Any] = optimizer.state[owner]
    if not state and isinstance(optimizer, Muon) and optimizer.holds_matrices(owner):
        optimizer.momentum(owner)
    elif not state:
        on_device = optimizer.defaults.get("fused", False)
        in_torch = isinstance(optimizer, torch.optim.AdamW)
        state["step"] = torch.zeros((), device=owner.device if on_device else "cpu") if in_torch else 0
        for kind in ADAM_KINDS[1:]:
            state[kind] = torch.zeros_like(owner, requires_grad=False)
    return state


def _grad_scaler(engine: DeepSpeedEngine) -> torch.amp.GradScaler | None:
    """Return torch's gradient scaler, which DeepSpeed uses for autocast to fp16; None elsewhere."""
    return engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def _loss_scaler(engine: DeepSpeedEngine) -> object | None:
    """Return DeepSpeed's scaler of losses in fp16 if it is dynamic; None elsewhere."""
    optimizer = engine.optimizer
    scaler: object = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
    is_dynamic = getattr(scaler, "dynamic_loss_scale", False) or getattr(scaler, "dynamic", False)
    return scaler if is_dynamic else None
