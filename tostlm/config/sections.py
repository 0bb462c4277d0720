"""The sections of a run's config, strict and frozen, and what is derived from them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import pydantic
import torch

from tostlm.config.training import Positive, Section, TrainConfig
from tostlm.errors import UserError
from tostlm.model import MIXERS, ModelConfig

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


# The options of some registered mixer, told apart by their key `mixer`.
AnyMixerOptions: Any = Annotated[
    Union[tuple(mixer.options_class for mixer in MIXERS.values())],  # noqa: UP007  (the members are known at run time)
    pydantic.Field(discriminator="mixer"),
]


@dataclass(frozen=True)
class RunModelConfig(ModelConfig):
    """The model section: a `ModelConfig` whose layer plan is validated by the mixers' own options."""

    layers: tuple[AnyMixerOptions, ...]


class BlendedSet(Section):
    """A prepared folder and its share of the samples, relative to the other weights."""

    path: Path
    weight: Annotated[float, pydantic.Field(gt=0)]


class CurriculumStage(Section):
    """The context before step `until_step`."""

    until_step: Positive
    context_tokens: Positive


class DataConfig(Section):
    """Which tokens a run reads, and how many at once."""

    path: Path | None = None  # a folder made by `tostlm prepare`
    blend: tuple[BlendedSet, ...] = ()  # or several, made with one tokenizer
    context_tokens: Positive
    reset_at_documents: bool = False  # forget at every document end that is read
    within_documents: bool = False  # windows of one document each, of documents that long
    stateful: bool = False  # rows read their documents on from step to step; the model remembers across windows
    curriculum: tuple[CurriculumStage, ...] = ()  # earlier stages, before context_tokens takes over
    verify_checksums: bool = True  # read every shard once before training

    @property
    def sets(self) -> tuple[tuple[Path, float], ...]:
        """Every prepared folder that is read, and its weight."""
        return ((self.path, 1.0),) if self.path else tuple((part.path, part.weight) for part in self.blend)

    @property
    def folders(self) -> list[Path]:
        """Every prepared folder that is read."""
        return [folder for folder, _ in self.sets]

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """First step and context in tokens of every stage, in order."""
        first_steps = (0, *(stage.until_step for stage in self.curriculum))
        contexts = (*(stage.context_tokens for stage in self.curriculum), self.context_tokens)
        return tuple(zip(first_steps, contexts, strict=True))

    @pydantic.model_validator(mode="after")
    def _one_way_to_name_sets(self) -> DataConfig:
        if (self.path is None) == (not self.blend):
            raise ValueError("set one of path, a prepared folder, and blend, a list of {path, weight}")
        folders = [part.path for part in self.blend]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f"blend names {folder} twice; add up its weights")
        return self

    @pydantic.model_validator(mode="after")
    def _stages_in_order(self) -> DataConfig:
        for (before, _), (step, _) in pairwise(self.stages):
            if step <= before:
                raise ValueError(f"curriculum until_step {step} must be above the {before} before it")
        for stage in self.curriculum:
            if stage.context_tokens > self.context_tokens:
                raise ValueError(
                    f"curriculum context_tokens {stage.context_tokens} is longer than data.context_tokens "
                    f"{self.context_tokens}, the longest; raise that"
                )
        return self


class OptimizerConfig(Section):
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


class RunConfig(Section):
    """Everything that decides a run."""

    run_dir: Path
    seed: Annotated[int, pydantic.Field(ge=0, lt=1 << 63)] = 0
    model: RunModelConfig
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: dict[str, Any] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        context, positions = self.data.context_tokens, self.model.positions
        if positions is not None and context > positions:
            raise ValueError(
                f"data.context_tokens {context} is longer than model.positions {positions}; raise model.positions"
            )
        last_stage = self.data.stages[-1][0]
        if last_stage >= self.train.steps:
            raise ValueError(
                f"data.curriculum until_step {last_stage} must be below train.steps {self.train.steps}; "
                "data.context_tokens takes over there"
            )
        self._whole_contexts()
        self._mixers_share_contexts()
        self._carried_state_fits()
        for key in self.deepspeed:
            if key in DERIVED_DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is derived; set {DERIVED_DEEPSPEED_KEYS[key]} instead")
            if key not in DEEPSPEED_KEYS:
                raise ValueError(f"deepspeed.{key} is no DeepSpeed key{nearest(key, DEEPSPEED_KEYS)}")
            if key in DEEPSPEED_BLOCKS and not isinstance(self.deepspeed[key], dict):
                raise ValueError(f"deepspeed.{key} is {self.deepspeed[key]!r}; it must be a mapping of keys")
        clip = self.deepspeed.get("gradient_clipping", 0.0)
        if isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 <= clip < math.inf:
            raise ValueError(f"deepspeed.gradient_clipping is {clip!r}; it must be a number, 0 for none")
        return self

    def _whole_contexts(self) -> None:
        group = self.train.context_parallel_size
        for _, context in self.data.stages:
            if context % group:
                raise ValueError(
                    f"a context of {context} tokens does not split over train.context_parallel_size {group}; "
                    f"try {_nearest_multiple(context, group)}"
                )
        unit = math.lcm(*(context for _, context in self.data.stages))
        for key, ranks in (("batch_tokens", 1), ("micro_batch_tokens", group)):
            tokens = getattr(self.train, key)
            for _, context in self.data.stages:
                if tokens * ranks % context:
                    over = f" over {ranks} ranks" if ranks > 1 else ""
                    raise ValueError(
                        f"train.{key} {tokens}{over} does not divide into contexts of {context} tokens; "
                        f"try {_nearest_multiple(tokens, unit // math.gcd(unit, ranks))}"
                    )

    def _mixers_share_contexts(self) -> None:
        heads, group = self.model.heads, self.train.context_parallel_size
        for options in self.model.layers if group > 1 else ():
            way = MIXERS[options.mixer].context_parallel
            if way is None:
                raise ValueError(f"{options.mixer} layers cannot share a context; set train.context_parallel_size to 1")
            if way == "heads" and heads % group:
                raise ValueError(
                    f"model.heads {heads} do not split over train.context_parallel_size {group}, as {options.mixer} "
                    f"layers need; try train.context_parallel_size={math.gcd(heads, group)}"
                )

    def _carried_state_fits(self) -> None:
        if not self.data.stateful:
            return
        growing = [options.mixer for options in self.model.layers if not MIXERS[options.mixer].constant_state]
        if growing or self.model.positions is not None:
            raise ValueError(
                "data.stateful needs a state that does not grow: model.positions null, and model.layers without "
                f"mixers whose state does{f', such as {growing[0]}' if growing else ''}"
            )
        if not self.data.reset_at_documents or self.data.within_documents or self.data.curriculum:
            raise ValueError(
                "data.stateful goes with data.reset_at_documents true, and without within_documents or curriculum"
            )

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


def matmul_dtype(config: RunConfig) -> torch.dtype:
    """What a run multiplies matrices in."""
    name = config.precision.removeprefix("autocast ").removeprefix("torch.")
    return {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}.get(
        name, torch.float32
    )


class BatchPlan(NamedTuple):
    """How one step's tokens are shared out, at contexts of `data.context_tokens`."""

    sequences: int  # a step, over all ranks
    micro_sequences: int  # a forward and backward pass of one group of `train.context_parallel_size` ranks
    accumulation: int  # passes of one rank a step


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """How `world_size` ranks share a step.

    Raises:
        UserError: the ranks are no whole groups, or the step does not divide into that many equal shares.
    """
    train, group = config.train, config.train.context_parallel_size
    if world_size % group:
        raise UserError(
            f"{world_size} ranks are no whole groups of train.context_parallel_size {group}; start a multiple of it"
        )
    per_pass = world_size * train.micro_batch_tokens
    if train.batch_tokens % per_pass:
        raise UserError(
            f"train.batch_tokens {train.batch_tokens} does not divide into {world_size} ranks x "
            f"train.micro_batch_tokens {train.micro_batch_tokens}; "
            f"try train.batch_tokens={_nearest_multiple(train.batch_tokens, per_pass)}"
        )
    context = config.data.context_tokens
    return BatchPlan(
        train.batch_tokens // context,
        train.micro_batch_tokens * group // context,
        train.batch_tokens // per_pass,
    )


def nearest(key: str, known: Iterable[str]) -> str:
    """The end of a message on an unknown key: the known one most like it, if any is."""
    match = difflib.get_close_matches(key, list(known), n=1)
    return f"; the nearest is {match[0]}" if match else ""


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
