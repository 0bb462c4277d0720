"""The `deepspeed` section of a config: what DeepSpeed lets through, held to what a run can honour."""

from __future__ import annotations

import difflib
import os
import pydoc
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import torch

from tostlm.model import ModelConfig, largest_part_numel

Number = Annotated[float, pydantic.Field(strict=True, ge=0)]
Flag = Annotated[bool, pydantic.Field(strict=True)]
DType = Literal["fp32", "bf16", "fp16"]


# Buffers of ZeRO stage 3, in multiples of the largest layer. With DeepSpeed's own sizes, of up to 10^9 parameters, each
# rank holds the whole of most models.
STAGE3_BUFFERS = {
    "reduce_bucket_size": 1,
    "sub_group_size": 1,
    "stage3_prefetch_bucket_size": 1,
    "stage3_max_reuse_distance": 1,
    "stage3_max_live_parameters": 2,
}


class CheckedBlock(pydantic.BaseModel):
    """A block of which DeepSpeed checks neither names nor types, as far as a run can honour it."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)


class TorchAutocast(CheckedBlock):
    enabled: Flag = False
    dtype: str | None = None  # as DeepSpeed spells them, which it checks
    lower_precision_safe_modules: list[str] | None = None


class DataTypes(CheckedBlock):
    grad_accum_dtype: DType | None = None


class FlopsProfiler(CheckedBlock):
    enabled: Flag = False
    recompute_fwd_factor: Number = 0.0
    profile_step: Annotated[int, pydantic.Field(strict=True, ge=1)] = 1
    module_depth: Annotated[int, pydantic.Field(strict=True, ge=-1)] = -1
    top_modules: Annotated[int, pydantic.Field(strict=True, ge=1)] = 1
    detailed: Flag = True
    output_file: str | None = None


class DeepSpeedBlock(CheckedBlock):
    """The section. DeepSpeed checks the blocks that are dicts here."""

    bf16: dict[str, Any] = {}
    fp16: dict[str, Any] = {}
    torch_autocast: TorchAutocast = TorchAutocast()
    data_types: DataTypes = DataTypes()
    zero_optimization: dict[str, Any] = {}
    gradient_clipping: Number = 0.0
    prescale_gradients: Flag = False
    gradient_predivide_factor: Annotated[float, pydantic.Field(strict=True, gt=0)] = 1.0
    communication_data_type: DType | None = None
    seq_parallel_communication_data_type: DType | None = None
    disable_allgather: Flag = False
    zero_allow_untested_optimizer: Flag = False
    zero_force_ds_cpu_optimizer: Flag = True
    steps_per_print: Annotated[int, pydantic.Field(strict=True, ge=1)] | None = None
    dump_state: Flag = False
    memory_breakdown: Flag = False
    wall_clock_breakdown: Flag = False
    comms_logger: dict[str, Any] = {}
    csv_monitor: dict[str, Any] = {}
    flops_profiler: FlopsProfiler = FlopsProfiler()
    tensorboard: dict[str, Any] = {}


_Block = TypeVar("_Block", bound=pydantic.BaseModel)

# Keys that are derived from tostlm's own, and the key to set instead.
DERIVED = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}
# Dotted keys that DeepSpeed takes and a run cannot honour: the values that are harmless, and what the others would do.
REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_allreduce_op": (("mean",), "would make the gradient depend on the number of ranks"),
    "checkpoint": ((), "is for DeepSpeed's own checkpoints; tostlm writes others, see train.save_*"),
    "aio": ((), "is for offloading to NVMe, where checkpoints do not reach"),
    "zero_optimization.round_robin_gradients": (
        (False,),
        "would order the optimizer's state in a way that checkpoints cannot follow",
    ),
    "zero_optimization.compute_grad_norm": ((True,), "would hide gradients that are not finite"),
    "zero_optimization.legacy_stage1": ((False,), "was removed from DeepSpeed"),
    "zero_optimization.stage3_module_granularity_threshold": (
        (0,),
        "breaks modules whose parameters it would gather together",
    ),
    **dict.fromkeys(
        ("bf16.bf16_master_weights_and_grads", "bf16.bf16_optimizer_states", "fp16.fp16_master_weights_and_grads"),
        ((False,), "would round the optimizer's state, which checkpoints hold in fp32"),
    ),
    "zero_optimization.zenflow": ((None,), "keeps state where checkpoints do not reach"),
    **dict.fromkeys(
        (f"zero_optimization.cpu_offload{kind}" for kind in ("", "_param", "_use_pin_memory")),
        ((None, False), "is deprecated by DeepSpeed; set offload_optimizer or offload_param"),
    ),
    **dict.fromkeys(
        (f"zero_optimization.zero_quantized_{kind}" for kind in ("weights", "nontrainable_weights", "gradients")),
        ((False,), "needs GPU kernels that no test of tostlm has run"),
    ),
    **{
        f"zero_optimization.offload_{kind}.{key}": (
            harmless,
            "keeps state where checkpoints do not reach; use device: cpu, and only that",
        )
        for kind in ("optimizer", "param")
        for key, harmless in (("device", ("none", "cpu", None)), ("ratio", (1, 1.0)), ("super_offload", (False,)))
    },
}


def check_deepspeed_block(block: Mapping[str, Any]) -> None:
    """Check the `deepspeed` section of a config as DeepSpeed will when ranks start, and for what it lets through.

    Raises:
        ValueError: a key or a value is wrong, or has an effect that a run cannot have.
    """
    for key, own in DERIVED.items():
        if key in block:
            raise ValueError(f"deepspeed.{key} is derived; set {own} instead")
    for dotted, (harmless, effect) in REFUSED.items():
        found, value = _look_up(block, dotted.split("."))
        if found and value not in harmless:
            raise ValueError(f"deepspeed.{dotted}={value!r} {effect}; leave it out")
    _validate(DeepSpeedBlock, block, "deepspeed")
    stage = block.get("zero_optimization", {}).get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:  # DeepSpeed takes "1" and true for 1
        raise ValueError(f"deepspeed.zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    _check_as_deepspeed(block)
    _check_together(block)


def _look_up(block: Mapping[str, Any], keys: list[str]) -> tuple[bool, Any]:
    """Return whether nested keys are set, and the value."""
    value: Any = block
    for key in keys:
        if not isinstance(value, Mapping) or key not in value:
            return False, None
        value = value[key]
    return True, value


def _check_as_deepspeed(block: Mapping[str, Any]) -> None:
    """Build DeepSpeed's own config classes, which check the inner blocks and what goes together."""
    use_cpu_without_gpu()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.monitor.config import CSVConfig, TensorBoardConfig
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
        "zero_optimization": DeepSpeedZeroConfig,
        "comms_logger": CommsLoggerConfig,
        "csv_monitor": CSVConfig,
        "tensorboard": TensorBoardConfig,
    }
    for name, kind in kinds.items():
        values = block.get(name, {})
        _require_same_types(_validate(kind, values, f"deepspeed.{name}"), values, f"deepspeed.{name}")
    try:
        DeepSpeedConfig({**block, "train_micro_batch_size_per_gpu": 1})
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, "deepspeed", DeepSpeedBlock)) from None
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed rejects the deepspeed block: {' '.join(str(error).split())}") from None


def _require_same_types(read: pydantic.BaseModel, values: Mapping[str, Any], where: str) -> None:
    """Check that DeepSpeed `read` no value as one of another type: "false" as false, or "auto" as its default."""
    name_of = {field.alias: name for name, field in type(read).model_fields.items()}
    for key, value in values.items():
        found = getattr(read, name_of.get(key, key), None)  # DeepSpeed removes deprecated keys
        if isinstance(found, pydantic.BaseModel) and isinstance(value, Mapping):
            _require_same_types(found, value, f"{where}.{key}")
        elif isinstance(found, bool) and not isinstance(value, bool):
            raise ValueError(f"{where}.{key}={value!r} must be true or false")
        elif isinstance(found, int | float) and isinstance(value, str | bool) and not isinstance(found, bool):
            raise ValueError(f"{where}.{key}={value!r} must be a number; write one, or leave it out")


def weights_precision(block: Mapping[str, Any]) -> str:
    """Return the dtype of the weights that a model computes with: fp32, bf16 or fp16."""
    return next((dtype for dtype in ("bf16", "fp16") if block.get(dtype, {}).get("enabled")), "fp32")


def zero_block(block: Mapping[str, Any], model: ModelConfig) -> dict[str, Any]:
    """Return the zero_optimization block of a `deepspeed` section, at stage 3 with buffers sized after the model."""
    own = block.get("zero_optimization", {})
    if own.get("stage", 0) < 3:
        return dict(own)
    numel = largest_part_numel(model)
    return {**{name: multiple * numel for name, multiple in STAGE3_BUFFERS.items()}, **own}


def _check_together(block: Mapping[str, Any]) -> None:
    """Check what DeepSpeed checks only once it has an optimizer, on all ranks."""
    zero = block.get("zero_optimization", {})
    stage, bucket = zero.get("stage", 0), zero.get("allgather_bucket_size", 0)
    if stage in (1, 2) and bucket % 2:
        raise ValueError(f"deepspeed.zero_optimization.allgather_bucket_size={bucket} must be even")
    for key, harmless in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
        if stage > 1 and zero.get("reduce_scatter", True) and block.get(key, harmless) != harmless:
            raise ValueError(
                f"deepspeed.{key}={block[key]} does not go with ZeRO stage {stage}; leave it out, or set "
                "deepspeed.zero_optimization.reduce_scatter to false"
            )
    own = weights_precision(block)
    summed = block.get("data_types", {}).get("grad_accum_dtype") or own
    if stage == 0 and summed != own:
        raise ValueError(
            f"deepspeed.data_types.grad_accum_dtype={summed} is not the {own} of the weights, which ZeRO stage 0 "
            "needs; leave it out, or choose another stage"
        )
    for name in block.get("torch_autocast", {}).get("lower_precision_safe_modules") or ():
        try:
            found = pydoc.locate(name)
        except pydoc.ErrorDuringImport:
            found = None
        if not isinstance(found, type):
            raise ValueError(f"deepspeed.torch_autocast.lower_precision_safe_modules: {name!r} is no class to import")


def _validate(kind: type[_Block], values: Mapping[str, Any], where: str) -> _Block:
    try:
        return kind(**values)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, where, kind)) from None


def _explain(error: pydantic.ValidationError, where: str, kind: type[pydantic.BaseModel]) -> str:
    problem = error.errors()[0]
    key = ".".join([where, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
        block: Any = kind
        for inner in problem["loc"][:-1]:
            field = getattr(block, "model_fields", {}).get(str(inner))
            block = field.annotation if field is not None else None
        known = getattr(block, "model_fields", ())
        return f"{key} is an unknown key{nearest(str(problem['loc'][-1]), known)}"
    value = "" if isinstance(problem["input"], pydantic.BaseModel) else f"={problem['input']!r}"
    return f"{key}{value}: {problem['msg'].removeprefix('Value error, ')}"


def nearest(key: str, known: Iterable[str]) -> str:
    """Return the end of an error message on an unknown key: the most similar known one, if there is one."""
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"; the nearest is {match[0]}" if match else ""


def use_cpu_without_gpu() -> None:
    """Tell DeepSpeed, before it is imported, to use the CPU where there is no GPU; it would warn that it found none."""
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
