"""The sections of a run's config, and what is derived from them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import pydantic
import torch

from tostlm.config.deepspeed_block import check_deepspeed_block, weights_precision
from tostlm.errors import UserError
from tostlm.model import MIXERS, GroupRule, ModelConfig, hidden_matrices, matching_rule, parameter_names

T = TypeVar("T")


class OnResume(Enum):
    """What a config key may do between a checkpoint and the run that resumes it."""

    FIXED = "the losses would not continue with another value"
    FREE = "it may change"


Fixed = Annotated[T, OnResume.FIXED]
Free = Annotated[T, OnResume.FREE]

PositiveInt = Annotated[int, pydantic.Field(ge=1, lt=1 << 63)]
NonNegativeInt = Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0, le=1e30)]  # what fp32 holds, with room for factors
NonNegativeFloat = Annotated[float, pydantic.Field(ge=0, le=1e30)]


EvalContext = Annotated[int, pydantic.Field(ge=2, lt=1 << 63)]


class Strict(pydantic.BaseModel):
    """Keys and values of a file: frozen, and an unknown key is an error."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Section(Strict):
    """A part of a config. Every key is `Fixed`, `Free`, or a section of its own."""


def _fixed_keys(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys, and their values, that a resumed run must share with its checkpoint."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if OnResume.FIXED in field.metadata:
            yield key, value
        elif OnResume.FREE not in field.metadata:
            for index, inner in [("", value)] if isinstance(value, Section) else enumerate(value):
                yield from _fixed_keys(inner, f"{key}.{index}." if index != "" else f"{key}.")


Share = Annotated[float, pydantic.Field(ge=0, lt=1)]

# The options of some registered mixer, distinguished by their key `mixer`.
AnyMixerOptions: Any = Annotated[
    Union[tuple(mixer.options_class for mixer in MIXERS.values())],  # noqa: UP007  (the members are known at run time)
    pydantic.Field(discriminator="mixer"),
]


@dataclass(frozen=True)
class RunModelConfig(ModelConfig):
    """The model section: a `ModelConfig` whose layer plan is validated by the mixers' own options."""

    layers: tuple[AnyMixerOptions, ...]


class BlendedSet(Section):
    """A prepared folder of a blend."""

    path: Free[Path]  # a folder made by `tostlm prepare`
    weight: Fixed[PositiveFloat]  # share of the samples, relative to the other weights


class CurriculumStage(Section):
    """An earlier stage of a run, of shorter contexts or other batches."""

    until_step: Fixed[PositiveInt]  # the next stage starts after this step
    context_tokens: Fixed[PositiveInt | None] = None  # None is data.context_tokens
    batch_tokens: Fixed[PositiveInt | None] = None  # None is train.batch_tokens

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> CurriculumStage:
        if self.context_tokens is None and self.batch_tokens is None:
            raise ValueError(
                f"the stage until_step {self.until_step} has no effect: set context_tokens or batch_tokens"
            )
        return self


class Stage(NamedTuple):
    """What batches are from a step on."""

    first_step: int
    context_tokens: int  # of a sequence
    batch_tokens: int  # of a step, over all ranks


class DataConfig(Section):
    """The tokens a run trains on. One of `path` and `blend` is set."""

    path: Free[Path | None] = None  # a folder made by `tostlm prepare`
    blend: tuple[BlendedSet, ...] = ()  # several such folders, made with one tokenizer
    context_tokens: Fixed[PositiveInt]  # tokens of a training sequence, over all stages at most
    reset_at_documents: Fixed[bool] = False  # no influence across the documents of a sequence
    within_documents: Fixed[bool] = False  # each sequence from one document, of documents that are long enough
    stateful: Fixed[bool] = False  # sequences continue from step to step, and the model's state with them
    curriculum: tuple[CurriculumStage, ...] = ()  # earlier stages, of shorter contexts or other batches
    verify_checksums: Free[bool] = True  # of the shards, before training

    @property
    def sets(self) -> tuple[tuple[Path, float], ...]:
        """Every prepared folder and its weight."""
        return ((self.path, 1.0),) if self.path else tuple((part.path, part.weight) for part in self.blend)

    @property
    def folders(self) -> list[Path]:
        """Every prepared folder."""
        return [folder for folder, _ in self.sets]

    @pydantic.model_validator(mode="after")
    def _path_or_blend(self) -> DataConfig:
        if (self.path is None) == (not self.blend):
            raise ValueError("set one of path, a prepared folder, and blend, a list of {path, weight}")
        folders = [part.path for part in self.blend]
        for folder in folders:
            if folders.count(folder) > 1:
                raise ValueError(f"blend names {folder} twice; add up its weights")
        return self

    @pydantic.model_validator(mode="after")
    def _stages_in_order(self) -> DataConfig:
        for before, stage in pairwise(self.curriculum):
            if stage.until_step <= before.until_step:
                raise ValueError(
                    f"curriculum until_step {stage.until_step} must be above the {before.until_step} before it"
                )
        for stage in self.curriculum:
            if (stage.context_tokens or 0) > self.context_tokens:
                raise ValueError(
                    f"curriculum context_tokens {stage.context_tokens} is longer than data.context_tokens "
                    f"{self.context_tokens}, the longest; raise that"
                )
        return self


class TrainConfig(Section):
    """How a run trains, what it reports, saves and survives. Batches are in tokens."""

    steps: Free[PositiveInt]
    branch_from: Free[Path | None] = None  # a new run begins from this checkpoint of another, steps counted on
    batch_tokens: Fixed[PositiveInt]  # per step, over all ranks
    micro_batch_tokens: Free[PositiveInt]  # per forward and backward pass of one rank
    context_parallel_size: Free[PositiveInt] = 1  # neighbouring ranks that share each sequence
    activation_checkpointing_every: Free[PositiveInt | None] = None  # recompute every n-th block in the backward pass
    compile: Free[bool] = False  # torch.compile each block

    ema_decay: Free[Share | None] = None  # of a moving average of the weights, beside them; None for none

    log_every_steps: Free[PositiveInt] = 10
    statistics_every_steps: Free[PositiveInt | None] = None  # of layers: activations, gradients, updates, mixers' own
    profile_steps: Free[tuple[PositiveInt, PositiveInt] | None] = None  # first and last step of a profiler trace
    wandb_project: Free[str | None] = None  # log to Weights & Biases, beside TensorBoard
    eval_every_steps: Free[PositiveInt] = 1000
    eval_tokens: Free[PositiveInt]  # held-out tokens per evaluation
    eval_contexts: Free[tuple[EvalContext, ...]] = ()  # in tokens; the same held-out tokens are scored at each too

    save_every_steps: Free[PositiveInt] = 1000
    save_in_background: Free[bool] = True  # write checkpoints while training continues
    save_weights: Free[bool] = True  # also a file of the weights alone, for evaluation and conversion elsewhere
    keep_last_checkpoints: Free[PositiveInt | None] = None  # None keeps all
    keep_every_steps: Free[PositiveInt | None] = None  # keep the checkpoints of multiples of this too
    keep_best_checkpoint: Free[bool] = False  # keep that of the lowest validation loss too

    time_limit_minutes: Free[PositiveFloat | None] = None  # then save and exit, to be started again
    hang_timeout_seconds: Free[PositiveInt] = 600  # the job ends within it when a rank makes no progress
    bad_steps_before_rollback: Free[PositiveInt] = 5  # in a row; of a bad step loss or gradient are not finite
    rollbacks_before_stop: Free[NonNegativeInt] = 3
    spike_zscore: Free[PositiveFloat | None] = None  # standard deviations above the mean that make a loss bad
    # Good steps of that mean and deviation.
    spike_window_steps: Free[Annotated[int, pydantic.Field(ge=2, le=1_000_000)]] = 100

    @pydantic.model_validator(mode="after")
    def _profile_steps_in_order(self) -> TrainConfig:
        if self.profile_steps is not None and self.profile_steps[1] < self.profile_steps[0]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} must be a first step and a last step")
        return self


class MuonConfig(Section):
    """Muon, for the matrices inside the blocks."""

    momentum: Free[Share] = 0.95
    newton_schulz_steps: Free[Annotated[int, pydantic.Field(ge=1, le=20)]] = 5
    newton_schulz_dtype: Free[Literal["bf16", "fp32"]] = "bf16"
    update_scale: Free[Literal["adamw_rms", "spectral"]] = "adamw_rms"
    cautious_weight_decay: Free[bool] = False  # only where an update makes weights smaller too
    split_heads: Free[bool] = False  # queries, keys and values are a matrix for each head
    normuon_beta2: Fixed[Share | None] = None  # of the mean squares by which the rows of an update are divided


class OptimizerGroup(Section):
    """What is otherwise for the parameters in whose names `match` is found."""

    match: Free[str]  # a regular expression
    lr_scale: Free[NonNegativeFloat] = 1.0  # times lr and min_lr
    weight_decay: Free[NonNegativeFloat | None] = None  # of those that decay; None is optimizer.weight_decay

    @pydantic.field_validator("match")
    @classmethod
    def _is_a_pattern(cls, match: str) -> str:
        try:
            re.compile(match)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{match!r} is no regular expression: {error}") from None
        return match

    @pydantic.model_validator(mode="after")
    def _says_something(self) -> OptimizerGroup:
        if self.lr_scale == 1 and self.weight_decay is None:
            raise ValueError(f"match {self.match!r} has no effect: set lr_scale or weight_decay")
        return self


class OptimizerConfig(Section):
    """AdamW, or Muon beside it, and the learning-rate schedule."""

    name: Fixed[Literal["adamw", "muon"]] = "adamw"
    muon: MuonConfig = MuonConfig()  # with name muon
    lr: Free[PositiveFloat]
    min_lr: Free[NonNegativeFloat]
    schedule: Free[Literal["cosine", "wsd"]] = "cosine"
    warmup_steps: Free[NonNegativeInt]
    decay_steps: Free[PositiveInt | None] = None  # steps of the final decay; with schedule wsd
    betas: Free[tuple[Share, Share]] = (0.9, 0.95)
    eps: Free[PositiveFloat] = 1e-8
    weight_decay: Free[NonNegativeFloat]
    groups: tuple[OptimizerGroup, ...] = ()  # of a parameter the first that matches counts

    @property
    def rules(self) -> list[GroupRule]:
        """The groups' rules."""
        return [GroupRule(**group.model_dump()) for group in self.groups]

    @pydantic.model_validator(mode="after")
    def _schedule_is_whole(self) -> OptimizerConfig:
        if self.name != "muon" and self.muon != MuonConfig():
            raise ValueError(f"the keys of optimizer.muon go with optimizer.name muon, and it is {self.name}")
        if (self.schedule == "wsd") != (self.decay_steps is not None):
            raise ValueError("decay_steps goes with schedule wsd: set both or neither")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


def _printable(path: Path) -> Path:
    if not str(path).isprintable():
        raise ValueError(f"{str(path)!r} has control characters, such as a line break; choose another name")
    return path


class RunConfig(Section):
    """Everything that determines a run. `deepspeed` is DeepSpeed's own configuration, passed on as it is."""

    run_dir: Free[Annotated[Path, pydantic.AfterValidator(_printable)]]
    seed: Fixed[Annotated[int, pydantic.Field(ge=0, lt=1 << 63)]] = 0
    model: Fixed[RunModelConfig]
    data: DataConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    deepspeed: Free[dict[str, Any]] = pydantic.Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> RunConfig:
        context, positions = self.data.context_tokens, self.model.positions
        if positions is not None and context > positions:
            raise ValueError(
                f"data.context_tokens {context} is longer than model.positions {positions}; raise model.positions"
            )
        if self.optimizer.warmup_steps > self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is above train.steps {self.train.steps}"
            )
        decay_start = self.train.steps - (self.optimizer.decay_steps or 0)
        if decay_start < self.optimizer.warmup_steps:
            raise ValueError(
                f"optimizer.decay_steps {self.optimizer.decay_steps} begin after step {decay_start}, within "
                f"optimizer.warmup_steps {self.optimizer.warmup_steps}; shorten one of them, or train.steps is too few"
            )
        last_stage = self.stages[-1].first_step
        if last_stage >= self.train.steps:
            raise ValueError(
                f"data.curriculum until_step {last_stage} must be below train.steps {self.train.steps}; "
                "data.context_tokens and train.batch_tokens take over there"
            )
        self._check_groups(parameter_names(self.model))  # the layers' own ValueErrors come first
        self._check_divisibility()
        self._check_eval_contexts()
        self._check_context_parallelism()
        self._check_stateful()
        check_deepspeed_block(self.deepspeed)
        if self.optimizer.muon.split_heads and hidden_matrices(self.model) == hidden_matrices(self.model, True):
            raise ValueError(
                f"optimizer.muon.split_heads has no effect: with model.heads {self.model.heads} no projection of these "
                "layers is divided among heads; leave it out"
            )
        if self.optimizer.name == "muon" and self.optimizer_on_cpu:
            raise ValueError(
                "deepspeed.zero_optimization.offload_optimizer does not go with optimizer.name muon, which needs whole "
                "matrices where the model is; leave it out, or use adamw"
            )
        return self

    def _check_groups(self, names: list[str]) -> None:
        rules = self.optimizer.rules
        used = {matching_rule(name, rules) for name in names}
        for place, rule in enumerate(rules):
            if place not in used:
                fits = any(re.search(rule.match, name) for name in names)
                why = "every parameter of it is in a group before it" if fits else "no parameter's name has it"
                raise ValueError(
                    f"optimizer.groups match {rule.match!r} has no effect: {why}; names are {', '.join(names[:3])}, "
                    f"..., {names[-1]}"
                )

    def _check_divisibility(self) -> None:
        group = self.train.context_parallel_size
        for _, context, _ in self.stages:
            if context % group:
                raise ValueError(
                    f"a context of {context} tokens does not split over train.context_parallel_size {group}; "
                    f"try {_nearest_multiple(context, group)}"
                )
        unit, micro = math.lcm(*(stage.context_tokens for stage in self.stages)), self.train.micro_batch_tokens
        sizes = [(key, stage.batch_tokens, 1, stage.context_tokens) for key, stage in self.named_stages]
        sizes += [("train.micro_batch_tokens", micro, group, stage.context_tokens) for stage in self.stages]
        for key, tokens, ranks, context in sizes:
            if tokens * ranks % context:
                over = f" over {ranks} ranks" if ranks > 1 else ""
                raise ValueError(
                    f"{key} {tokens}{over} does not divide into contexts of {context} tokens; "
                    f"try {_nearest_multiple(tokens, unit // math.gcd(unit, ranks))}"
                )

    def _check_eval_contexts(self) -> None:
        positions, group = self.model.positions, self.train.context_parallel_size
        for context in self.train.eval_contexts:
            if positions is not None and context > positions:
                raise ValueError(f"train.eval_contexts {context} is longer than model.positions {positions}")
            if context % group:
                raise ValueError(
                    f"train.eval_contexts {context} does not split over train.context_parallel_size {group}; "
                    f"try {_nearest_multiple(context, group)}"
                )

    def _check_context_parallelism(self) -> None:
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

    def _check_stateful(self) -> None:
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
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the run, in order."""
        return tuple(stage for _, stage in self.named_stages)

    @property
    def named_stages(self) -> tuple[tuple[str, Stage], ...]:
        """The stages of the run, in order, each with the key that has its batch."""
        context, batch, own = self.data.context_tokens, self.train.batch_tokens, self.data.curriculum
        first_steps = (0, *(stage.until_step for stage in own))
        stages = [(s.context_tokens or context, s.batch_tokens or batch) for s in own] + [(context, batch)]
        keys = ["train.batch_tokens" if s.batch_tokens is None else "curriculum batch_tokens" for s in own]
        found = (Stage(step, *sizes) for step, sizes in zip(first_steps, stages, strict=True))
        return tuple(zip([*keys, "train.batch_tokens"], found, strict=True))

    def tokens_after(self, step: int) -> int:
        """Return the training tokens of the first `step` steps."""
        ends = [*(stage.first_step for stage in self.stages[1:]), step]
        return sum(
            max(0, min(step, end) - stage.first_step) * stage.batch_tokens
            for stage, end in zip(self.stages, ends, strict=True)
        )

    @property
    def tokens(self) -> int:
        """Training tokens of the whole run."""
        return self.tokens_after(self.train.steps)

    @property
    def zero_stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))

    @property
    def optimizer_on_cpu(self) -> bool:
        """Whether DeepSpeed offloads the optimizer."""
        return self._offloads("optimizer")

    @property
    def parameters_on_cpu(self) -> bool:
        """Whether DeepSpeed offloads the weights, which it does at ZeRO stage 3."""
        return self._offloads("param")

    def _offloads(self, part: str) -> bool:
        offload = self.deepspeed.get("zero_optimization", {}).get(f"offload_{part}")
        return isinstance(offload, dict) and offload.get("device") == "cpu"

    @property
    def precision(self) -> str:
        """How matrices are multiplied: fp32, bf16 or fp16 weights, or "autocast DTYPE" with fp32 weights."""
        weights, autocast = weights_precision(self.deepspeed), self.deepspeed.get("torch_autocast", {})
        if weights == "fp32" and autocast.get("enabled"):
            return f"autocast {autocast.get('dtype', 'bfloat16')}"
        return weights


def fixed_values(config: RunConfig) -> dict[str, Any]:
    """Return the values that a run must share with its checkpoint so that its losses continue, by config key."""
    values = dict(_fixed_keys(config))
    model = {f"model.{key}": value for key, value in asdict(values.pop("model")).items()}
    return {**model, **values, "precision": config.precision}


def matmul_dtype(config: RunConfig) -> torch.dtype:
    """Return the dtype of a run's matrix products."""
    name = config.precision.removeprefix("autocast ").removeprefix("torch.")
    return {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16}.get(
        name, torch.float32
    )


class BatchPlan(NamedTuple):
    """How the tokens of a step are divided, in sequences of `data.context_tokens`."""

    sequences: int  # of the largest step, over all ranks
    micro_sequences: int  # per forward and backward pass of one context-parallel group
    accumulation: int  # gradient accumulation steps: passes of one rank in the largest step


def batch_plan(config: RunConfig, world_size: int) -> BatchPlan:
    """Return how `world_size` ranks divide a step.

    Raises:
        UserError: the ranks do not form whole context-parallel groups, or the step does not divide equally.
    """
    train, group = config.train, config.train.context_parallel_size
    if world_size % group:
        raise UserError(
            f"{world_size} ranks do not form whole groups of train.context_parallel_size {group}; "
            "start a multiple of it"
        )
    per_pass = world_size * train.micro_batch_tokens
    for key, stage in config.named_stages:
        if stage.batch_tokens % per_pass:
            raise UserError(
                f"{key} {stage.batch_tokens} does not divide into {world_size} ranks x "
                f"train.micro_batch_tokens {train.micro_batch_tokens}; "
                f"try {key.split()[-1]}={_nearest_multiple(stage.batch_tokens, per_pass)}"
            )
    context, largest = config.data.context_tokens, max(stage.batch_tokens for stage in config.stages)
    return BatchPlan(largest // context, train.micro_batch_tokens * group // context, largest // per_pass)


def _nearest_multiple(value: int, unit: int) -> int:
    return max(1, round(value / unit)) * unit
