"""The `deepspeed` section of a config: what DeepSpeed lets through, held to what a run can honour."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import pydantic
import torch

Number = Annotated[float, pydantic.Field(strict=True, ge=0)]
Flag = Annotated[bool, pydantic.Field(strict=True)]


class DeepSpeedBlock(pydantic.BaseModel):
    """The top level of the section, of which DeepSpeed checks neither names nor types. It checks the inner blocks."""

    model_config = pydantic.ConfigDict(extra="forbid", allow_inf_nan=False)

    bf16: dict[str, Any] = {}
    fp16: dict[str, Any] = {}
    torch_autocast: dict[str, Any] = {}
    data_types: dict[str, Any] = {}
    zero_optimization: dict[str, Any] = {}
    gradient_clipping: Number = 0.0
    prescale_gradients: Flag = False
    gradient_predivide_factor: Annotated[float, pydantic.Field(strict=True, gt=0)] = 1.0
    communication_data_type: str | None = None
    seq_parallel_communication_data_type: str | None = None
    disable_allgather: Flag = False
    zero_allow_untested_optimizer: Flag = False
    zero_force_ds_cpu_optimizer: Flag = True
    steps_per_print: Annotated[int, pydantic.Field(strict=True, ge=1)] | None = None
    dump_state: Flag = False
    memory_breakdown: Flag = False
    wall_clock_breakdown: Flag = False
    comms_logger: dict[str, Any] = {}
    csv_monitor: dict[str, Any] = {}
    flops_profiler: dict[str, Any] = {}
    tensorboard: dict[str, Any] = {}


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
INNER_KEYS = {  # of the blocks whose keys DeepSpeed does not check, as far as a run can honour them
    "data_types": ("grad_accum_dtype",),
    "flops_profiler": (
        *("enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"),
    ),
    "torch_autocast": ("enabled", "dtype", "lower_precision_safe_modules"),
}
DTYPES = ("fp32", "bf16", "fp16")


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
    for name, known in INNER_KEYS.items():
        for key in block.get(name, {}):
            if key not in known:
                raise ValueError(f"deepspeed.{name}.{key} is an unknown key{nearest(key, known)}")
    dtype = block.get("data_types", {}).get("grad_accum_dtype")
    if dtype not in (None, *DTYPES):
        raise ValueError(f"deepspeed.data_types.grad_accum_dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    _check_as_deepspeed(block)


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
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    kinds = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config, "zero_optimization": DeepSpeedZeroConfig}
    for name, kind in kinds.items():
        _validate(kind, block.get(name, {}), f"deepspeed.{name}")
    try:
        DeepSpeedConfig({**block, "train_micro_batch_size_per_gpu": 1})
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, "deepspeed", {})) from None
    except (ValueError, TypeError, AssertionError, DeepSpeedConfigError) as error:
        raise ValueError(f"DeepSpeed rejects the deepspeed block: {' '.join(str(error).split())}") from None


def _validate(kind: type[pydantic.BaseModel], values: Mapping[str, Any], where: str) -> None:
    try:
        kind(**values)
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, where, kind.model_fields)) from None


def _explain(error: pydantic.ValidationError, where: str, known: Iterable[str]) -> str:
    problem = error.errors()[0]
    key = ".".join([where, *map(str, problem["loc"])])
    if problem["type"] == "extra_forbidden":
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
