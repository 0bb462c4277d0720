"""Run configurations: one YAML file a run, strict, frozen, with dotted overrides."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import yaml

from tostlm.errors import UserError
from tostlm.model import ModelConfig

Positive = Annotated[int, pydantic.Field(ge=1)]
Share = Annotated[float, pydantic.Field(ge=0, lt=1)]

# What tostlm derives from its own keys, and the key to set instead.
DERIVED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.batch_tokens",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.batch_tokens and train.micro_batch_tokens",
    "optimizer": "optimizer",
    "scheduler": "optimizer.schedule",
}
# DeepSpeed takes unknown top-level keys in silence (blocks inside it check their own), so they are known here.
DEEPSPEED_KEYS = (
    "aio",
    "bf16",
    "checkpoint",
    "comms_logger",
    "communication_data_type",
    "csv_monitor",
    "data_types",
    "disable_allgather",
    "dump_state",
    "flops_profiler",
    "fp16",
    "gradient_allreduce_op",
    "gradient_clipping",
    "gradient_predivide_factor",
    "memory_breakdown",
    "prescale_gradients",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "tensorboard",
    "torch_autocast",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
)


DEEPSPEED_BLOCKS = ("bf16", "data_types", "fp16", "torch_autocast", "zero_optimization")


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataConfig(_Section):
    """Which tokens a run reads, and how many at once."""

    path: Path  # a folder made by `tostlm prepare`
    context_tokens: Positive
    verify_checksums: bool = True  # read every shard once before training


class TrainConfig(_Section):
    """How long a run trains, on how much at once, and what it leaves behind."""

    steps: Positive
    batch_tokens: Positive  # a step, over all ranks
    micro_batch_tokens: Positive  # a forward and backward pass of one rank
    log_every_steps: Positive = 10
    eval_every_steps: Positive = 1000
    eval_tokens: Positive  # held-out tokens an evaluation reads
    save_every_steps: Positive = 1000
    keep_last_checkpoints: Positive | None = None  # None keeps all


class OptimizerConfig(_Section):
    """AdamW and its learning rate."""

    lr: Annotated[float, pydantic.Field(gt=0)]
    min_lr: Annotated[float, pydantic.Field(ge=0)]
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Annotated[int, pydantic.Field(ge=0)]
    decay_steps: Positive | None = None  # of the final decay; wsd only
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: Annotated[float, pydantic.Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, pydantic.Field(ge=0)]

    @pydantic.model_validator(mode="after")
    def _schedule_is_whole(self) -> OptimizerConfig:
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps goes with schedule wsd: set both or neither")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class RunConfig(_Section):
    """Everything that decides a run."""

    run_dir: Path
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)] = 0
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: dict[str, Any] = {}

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        context, positions = self.data.context_tokens, self.model.positions
        if positions is not None and context > positions:
            raise ValueError(
                f"data.context_tokens {context} is longer than model.positions {positions}; raise model.positions"
            )
        for key in ("batch_tokens", "micro_batch_tokens"):
            tokens = getattr(self.train, key)
            if tokens % context:
                raise ValueError(
                    f"train.{key} {tokens} does not divide into contexts of {context} tokens; "
                    f"try {_nearest_multiple(tokens, context)}"
                )
        for key in self.deepspeed:
            if key in DERIVED_DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is derived; set {DERIVED_DEEPSPEED_KEYS[key]} instead")
            if key not in DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is no DeepSpeed key{_nearest(key, DEEPSPEED_KEYS)}")
            if key in DEEPSPEED_BLOCKS and not isinstance(self.deepspeed[key], dict):
                raise ValueError(f"deepspeed.{key} is {self.deepspeed[key]!r}; it must be a mapping of keys")
        clip = self.deepspeed.get("gradient_clipping", 0.0)
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < math.inf:
            raise ValueError(f"deepspeed.gradient_clipping is {clip!r}; it must be a number, 0 for none")
        return self

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.train.steps * self.train.batch_tokens

    @property
    def zero_stage(self) -> int:
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def precision(self) -> str:
        """What matrices are multiplied in, and whether by casting (autocast) or by keeping the weights in it."""
        for dtype in ("bf16", "fp16"):
            if self.deepspeed.get(dtype, {}).get("enabled"):
                return dtype
        autocast = self.deepspeed.get("torch_autocast", {})
        return f"autocast {autocast.get('dtype', 'bfloat16')}" if autocast.get("enabled") else "fp32"


class Batches(NamedTuple):
    """How one step's tokens are shared out."""

    sequences: int  # a step, over all ranks
    micro_sequences: int  # a forward and backward pass of one rank
    accumulation: int  # passes of one rank a step


def batches(config: RunConfig, world_size: int) -> Batches:
    """How `world_size` ranks share a step.

    Raises:
        UserError: the step does not divide into that many equal shares.
    """
    per_pass = world_size * config.train.micro_batch_tokens
    if config.train.batch_tokens % per_pass:
        raise UserError(
            f"train.batch_tokens {config.train.batch_tokens} does not divide into {world_size} ranks x "
            f"train.micro_batch_tokens {config.train.micro_batch_tokens}; "
            f"try train.batch_tokens={_nearest_multiple(config.train.batch_tokens, per_pass)}"
        )
    context = config.data.context_tokens
    return Batches(
        config.train.batch_tokens // context,
        config.train.micro_batch_tokens // context,
        config.train.batch_tokens // per_pass,
    )


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file; `overrides` are KEY=VALUE with dotted keys and YAML values.

    Raises:
        UserError: the file, a key or a value is wrong.
    """
    try:
        raw = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or no date where one is spelt
        raise UserError(f"config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"config {path} must be a mapping of keys, as configs/quickstart.yaml is")
    for override in overrides:
        _apply(raw, override)
    return _validate(raw, str(path))


def dump_config(config: RunConfig) -> str:
    """The config as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML whose floats may be written 3e-4, as YAML 1.2 has it and PyYAML does not."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override {override!r} is not KEY=VALUE, as in optimizer.lr=3e-4")
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"override {override!r}: {parent} holds a value, not keys")
    try:
        node[last] = yaml.load(value, _Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"override {override!r}: {value!r} is not a YAML value") from None


def _validate(raw: dict[str, Any], name: str) -> RunConfig:
    try:
        content = json.dumps(raw, default=str)
    except ValueError:
        raise UserError(f"{name}: a YAML alias stands inside what it names; write it out") from None
    try:
        return RunConfig.model_validate_json(content, strict=True)
    except pydantic.ValidationError as error:
        # An unknown key often leaves its namesake missing: name the cause, not the consequence.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] not in _UNKNOWN_KEY)
        raise UserError(f"{name}: {_explain(problems[0])}") from None


_UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def _explain(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in _UNKNOWN_KEY:
        return f"{key} is an unknown key{_nearest(key, _keys())}"
    if problem["type"].startswith("missing") and isinstance(problem["loc"][-1], int):
        return f"{key.rpartition('.')[0]} needs {problem['loc'][-1] + 1} values or more"
    if problem["type"].startswith("missing"):
        return f"{key} is missing; give it a value"
    if problem["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{key}={problem['input']!r}: {message[0].lower()}{message[1:]}"


def _keys(model: Any = RunConfig, prefix: str = "") -> Iterator[str]:
    fields = model.model_fields if issubclass(model, pydantic.BaseModel) else model.__dataclass_fields__
    hints = {name: getattr(field, "annotation", None) for name, field in fields.items()}
    for name, hint in hints.items():
        yield prefix + name
        if isinstance(hint, type) and (hint is ModelConfig or issubclass(hint, pydantic.BaseModel)):
            yield from _keys(hint, f"{prefix}{name}.")


def _nearest(key: str, known: Any) -> str:
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"; the nearest is {match[0]}" if match else ""


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
