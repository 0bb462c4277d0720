"""The state of a DeepSpeed engine by parameter, whole and in fp32: what no ZeRO stage and no number of ranks changes.

DeepSpeed keeps master weights and Adam's moments in tensors that its stages lay out differently: whole, flat, or flat
and cut among the ranks. Here each parameter's stretch of them on this rank is found, once for all stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from torch import Tensor

from tostlm.model import LM

KINDS = ("weight", "exp_avg", "exp_avg_sq")
LOSS_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # DeepSpeed's names


class DeepSpeedOptimizer(Protocol):
    """What every optimizer around which DeepSpeed builds an engine has, whatever the ZeRO stage."""

    param_groups: list[dict[str, Any]]


class DeepSpeedEngine(Protocol):
    """The part of `deepspeed.DeepSpeedEngine` that tostlm uses; DeepSpeed itself has no type annotations."""

    module: LM
    optimizer: DeepSpeedOptimizer
    basic_optimizer: torch.optim.Optimizer  # AdamW itself, which `optimizer` wraps under ZeRO
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
    def gradient_accumulation_steps(self) -> int: ...
    def get_global_grad_norm(self) -> Tensor | float | None: ...
    def fp16_enabled(self) -> bool: ...
    def bfloat16_enabled(self) -> bool: ...
    def zero_optimization(self) -> bool: ...
    def zero_optimization_stage(self) -> int: ...
    def zero_optimization_partition_weights(self) -> bool: ...


class Fragment(NamedTuple):
    """Where this rank has a part of a flattened parameter; of no elements where it has none."""

    begin: int  # in the parameter
    numel: int
    held: Tensor  # a tensor that Adam updates, and has its state by
    offset: int  # in `held`


def state_keys(name: str) -> list[str]:
    """What a parameter's master weight and moments are called in a checkpoint."""
    return [f"{name}/{kind}" for kind in KINDS]


def state_numels(engine: Any) -> dict[str, int]:
    """Elements of each parameter by name, in the model's order."""
    return {name: _shape(parameter).numel() for name, parameter in engine.module.named_parameters()}


@torch.no_grad()
def gather_state(engine: Any, rank_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Copies on the host of the tensors NAME/KIND whose NAME is this rank's by `rank_of`; every rank must call.

    Beside them a rank holds one whole tensor at a time.
    """
    gathered = {}
    for name, parameter in engine.module.named_parameters():
        own, cut = rank_of[name] == dist.get_rank(), engine.zero_optimization()
        stretch = _stretch(engine, parameter)
        for key, kind in zip(state_keys(name), KINDS, strict=True) if own or cut else ():
            whole = torch.zeros(_shape(parameter).numel(), dtype=torch.float32, device=engine.device)
            whole[stretch.begin : stretch.begin + stretch.numel] = _part(engine, stretch, kind)
            if cut:  # one rank has each element and the others zero bits, whose sum as integers is exact, even of -0.0
                dist.reduce(whole.view(torch.int32), dst=rank_of[name])
            if own:
                gathered[key] = whole.view(_shape(parameter)).cpu()
    return gathered


@torch.no_grad()
def restore_state(engine: Any, tensors: Iterable[tuple[str, Tensor]], optimizer_steps: int) -> None:
    """Write whole tensors NAME/KIND into the engine, and Adam's count; every rank must call, with all of them."""
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()  # parameters kept whole are cut again, to be gathered anew
    for key, tensor in tensors:
        name, _, kind = key.rpartition("/")
        stretch = _stretch(engine, parameters[name])
        if stretch.numel:
            _part(engine, stretch, kind).copy_(tensor.flatten()[stretch.begin : stretch.begin + stretch.numel])
    for held in _held(engine):
        state = _adam(engine, held)
        step = state["step"]  # DeepSpeed's own Adam counts in an int, torch's in a tensor
        state["step"] = torch.full_like(step, optimizer_steps) if isinstance(step, Tensor) else optimizer_steps
    _copy_masters_to_model(engine)


def optimizer_steps(engine: Any) -> int:
    """The updates that Adam has made."""
    return int(_adam(engine, _held(engine)[0])["step"])


def loss_scale(engine: Any) -> dict[str, float] | None:
    """The state of fp16's dynamic loss scale; None where there is none."""
    if grad_scaler := _grad_scaler(engine):
        return grad_scaler.state_dict()
    scaler = _loss_scaler(engine)
    return scaler and {key: getattr(scaler, key) for key in LOSS_SCALE if hasattr(scaler, key)}


def restore_loss_scale(engine: Any, values: Mapping[str, float] | None) -> None:
    """Write what `loss_scale` gave, at another ZeRO stage too."""
    if values is None:
        return
    if grad_scaler := _grad_scaler(engine):
        grad_scaler.load_state_dict(dict(values))
    elif scaler := _loss_scaler(engine):
        for key, value in values.items():
            if hasattr(scaler, key):  # stage 0 has no hysteresis
                setattr(scaler, key, value)


def whole_weights(engine: Any) -> dict[str, Tensor]:
    """The model as it computes, on the host of rank 0, empty elsewhere; every rank must call."""
    cut = engine.zero_optimization_partition_weights()
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]) if cut else nullcontext():
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _shape(parameter: Tensor) -> torch.Size:
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties a parameter between its uses


def _stretch(engine: Any, parameter: Any) -> Fragment:
    optimizer, numel = engine.optimizer, _shape(parameter).numel()
    if engine.zero_optimization_partition_weights():
        group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        begin = min(numel, share * dist.get_rank())  # the last shares are padded
        return Fragment(begin, min(share, numel - begin), optimizer.fp32_partitioned_groups_flat[group], offset)
    if engine.zero_optimization():
        mapping = parameter._hp_mapping
        if mapping is None:
            return Fragment(0, 0, _held(engine)[0], 0)
        (held,) = optimizer.param_groups[mapping.param_group_index]["params"]
        address = mapping.hp_fragment_address
        return Fragment(mapping.lp_fragment_address.start, address.numel, held, address.start)
    return Fragment(0, numel, _master(optimizer, parameter), 0)


def _master(optimizer: Any, parameter: Tensor) -> Tensor:
    """What Adam updates for a parameter without ZeRO: itself, or its copy in fp32."""
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return parameter
    return next(master for model, master in _copies(optimizer) if model is parameter)


def _copies(optimizer: Any) -> Iterable[tuple[Tensor, Tensor]]:
    for groups in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        yield from zip(*groups, strict=True)


def _held(engine: Any) -> list[Tensor]:
    """The tensors that this rank's Adam updates."""
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return [held for group in engine.optimizer.param_groups for held in group["params"]]


def _part(engine: Any, stretch: Fragment, kind: str) -> Tensor:
    """The elements of a stretch, which may be written."""
    tensor = stretch.held.detach() if kind == "weight" else _adam(engine, stretch.held)[kind]
    return tensor.view(-1)[stretch.offset : stretch.offset + stretch.numel]


def _adam(engine: Any, held: Tensor) -> dict[str, Any]:
    """Adam's state of a tensor, made as its first step would make it."""
    adam = engine.basic_optimizer
    state = adam.state[held]
    if not state:
        on_device = adam.defaults.get("fused", False)
        in_torch = isinstance(adam, torch.optim.AdamW)
        state["step"] = torch.zeros((), device=held.device if on_device else "cpu") if in_torch else 0
        for kind in KINDS[1:]:
            state[kind] = torch.zeros_like(held, requires_grad=False)
    return state


def _copy_masters_to_model(engine: Any) -> None:
    optimizer = engine.optimizer
    if engine.zero_optimization_partition_weights():
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif engine.zero_optimization():
        optimizer.update_lp_params()
    elif isinstance(optimizer, FP16_UnfusedOptimizer):
        for parameter, master in _copies(optimizer):
            parameter.copy_(master)


def _grad_scaler(engine: Any) -> Any:
    """torch's scaler, where autocast is to fp16."""
    return engine.torch_autocast_z0_gradscaler or getattr(engine.optimizer, "torch_autocast_gradscaler", None)


def _loss_scaler(engine: Any) -> Any:
    """DeepSpeed's scaler of fp16 weights, if it adapts."""
    optimizer = engine.optimizer
    scaler = getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)
    adapts = getattr(scaler, "dynamic_loss_scale", False) or getattr(scaler, "dynamic", False)
    return scaler if adapts else None
