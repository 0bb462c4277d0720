"""The `train` section of a run's config: how long, on how much at once, what it survives and what it leaves behind."""

from __future__ import annotations

from typing import Annotated

import pydantic

Positive = Annotated[int, pydantic.Field(ge=1)]
PositiveNumber = Annotated[float, pydantic.Field(gt=0)]


class Section(pydantic.BaseModel):
    """A strict and frozen part of a config."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class TrainConfig(Section):
    """How a run trains. Batches are in tokens."""

    steps: Positive
    batch_tokens: Positive  # a step, over all ranks
    micro_batch_tokens: Positive  # a forward and backward pass of one rank
    context_parallel_size: Positive = 1  # that one sequence is split over, neighbours in rank
    activation_checkpointing_every: Positive | None = None  # every n-th block is computed again in the backward pass
    compile: bool = False  # torch.compile each block

    log_every_steps: Positive = 10
    statistics_every_steps: Positive | None = None  # membership entropy and attention gate of every layer
    profile_steps: tuple[Positive, Positive] | None = None  # first and last step of a trace
    wandb_project: str | None = None  # Weights & Biases, beside TensorBoard
    eval_every_steps: Positive = 1000
    eval_tokens: Positive  # held-out tokens an evaluation reads

    save_every_steps: Positive = 1000
    save_in_background: bool = True  # write while training goes on
    save_weights: bool = True  # a file of the weights alone, for evaluation and conversion elsewhere
    keep_last_checkpoints: Positive | None = None  # None keeps all
    keep_every_steps: Positive | None = None  # checkpoints of these steps stay, whatever keep_last_checkpoints says
    keep_best_checkpoint: bool = False  # and that of the lowest held-out loss

    time_limit_minutes: PositiveNumber | None = None  # save and stop, to be started again, once that much has passed
    hang_timeout_seconds: Positive = 600  # a rank that does not get on ends the run within it
    bad_steps_before_rollback: Positive = 5  # in a row; a bad step has a loss or gradient that is no finite number
    rollbacks_before_stop: Annotated[int, pydantic.Field(ge=0)] = 3
    spike_zscore: PositiveNumber | None = None  # a loss so many standard deviations above the mean is a bad step too
    spike_window_steps: Annotated[int, pydantic.Field(ge=2)] = 100  # that mean and deviation are of

    @pydantic.model_validator(mode="after")
    def _trace_ends_after_its_start(self) -> TrainConfig:
        if self.profile_steps is not None and self.profile_steps[1] < self.profile_steps[0]:
            raise ValueError(f"profile_steps {list(self.profile_steps)} must be a first step and a last one")
        return self
