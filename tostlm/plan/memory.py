"""The memory that a run takes on each of its accelerators, by what holds it.

ZeRO divides the optimizer's state among ranks from stage 1 on, gradients from 2, weights from 3 (Rajbhandari et al.
2020, arXiv 1910.02054). What DeepSpeed 0.19.8 keeps beside them was read from its code and measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tostlm.checkpoint.layout import weights_dtype
from tostlm.config import RunConfig, batch_plan, matmul_dtype, zero_block
from tostlm.model import weight_shapes
from tostlm.model.loss import workspace_bytes
from tostlm.plan.sizes import (
    autocast_dtype,
    average_bytes,
    gradient_dtype,
    moment_bytes,
    total_parameters,
    weight_bytes,
)
from tostlm.plan.trace import BlockMemory, model_memory

DEFAULT_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in gradients
ADAM_COPIES = 2  # of what torch's AdamW updates at a time, where that is not one kernel


class Memory(NamedTuple):
    """Bytes on one accelerator when a step takes the most, by what holds them."""

    weights: int  # as the model computes with them
    master: int  # fp32 copies, which the optimizer updates
    optimizer: int  # moments, and the moving average of the weights
    gradients: int
    activations: int  # what blocks keep for the backward pass, and compute beside it
    loss: int  # logits, and the gradients made of them
    buffers: int  # DeepSpeed's buckets, weights gathered at stage 3, copies that the update makes

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self)


def memory(config: RunConfig, world_size: int, on_gpu: bool) -> Memory:
    """Return the memory of a rank at the fullest moment of a step: in a pass, at its end, or in the update.

    What torch and NCCL hold for themselves, and what an allocator cannot use, is not among it.

    Raises:
        UserError: the ranks do not divide the batch.
    """
    rank = _Rank.of(config, world_size, on_gpu)
    moments = (*_passes(config, world_size, rank), rank.reduction(), rank.update(config))
    return max(moments, key=lambda moment: moment.total)


class _Rank(NamedTuple):
    """What a rank holds between steps, and the sizes that its gradients have."""

    between: Memory
    stage: int
    on_gpu: bool
    accumulates: bool  # gradients over several micro-batches
    gradient: int  # bytes of all gradients
    own_gradient: int  # of those of the rank's part of the weights
    own_fp32: int  # bytes of the rank's part of the weights, in fp32
    bucket: int  # bytes in which gradients are put together; on a CPU as far as they fill it

    @classmethod
    def of(cls, config: RunConfig, world_size: int, on_gpu: bool) -> _Rank:
        stage, P = config.zero_stage, total_parameters(config)
        size = gradient_dtype(config).itemsize
        zero = zero_block(config.deepspeed, config.model)
        bucket = int(zero.get("reduce_bucket_size", DEFAULT_BUCKET))
        if not on_gpu or not zero.get("contiguous_gradients", True):
            bucket = min(P, bucket)
        elif zero.get("overlap_comm"):
            bucket *= 2
        own = 4 * P // (world_size if stage else 1)
        return cls(
            between=_between_steps(config, world_size),
            stage=stage,
            on_gpu=on_gpu,
            accumulates=batch_plan(config, world_size).accumulation > 1,
            gradient=P * size,
            own_gradient=P * size // (world_size if stage else 1),
            own_fp32=own,
            bucket=bucket * size,
        )

    def in_pass(self, made: int, activations: int, loss: int) -> Memory:
        """Return the memory in a pass that has `made` so many bytes of gradients."""
        if self.stage == 3:
            gradients, buffers = 0, made  # a part's at a time; they go on into what lies there between steps
        elif self.stage == 0:
            gradients, buffers = self.gradient if self.accumulates else made, 0
        else:
            gradients = (self.gradient if self.stage == 1 else self.own_gradient) if self.accumulates else 0
            # Those of stage 1 move from the sums into the bucket.
            moved = self.stage == 1 and self.accumulates and not self.on_gpu
            buffers = 0 if moved or not made else max(made, self.bucket if self.on_gpu else 0)
        return self._beside(gradients=gradients, activations=activations, loss=loss, buffers=buffers)

    def reduction(self) -> Memory:
        """Return the memory once the last pass is over, when gradients are summed over the ranks."""
        if self.stage == 3:
            return self.between
        if self.stage == 0:
            return self._beside(gradients=self.gradient, buffers=min(self.gradient, self.bucket))
        summed = self.gradient if self.accumulates and self.on_gpu and self.stage == 1 else 0
        return self._beside(gradients=summed + self.own_gradient, buffers=self.bucket)

    def update(self, config: RunConfig) -> Memory:
        """Return the memory in the update of the weights."""
        updated = self.own_fp32
        if self.stage == 3:
            largest = int(zero_block(config.deepspeed, config.model)["sub_group_size"])
            updated = min(updated, 4 * largest)
        elif self.stage == 0 and not self.between.master:
            updated = 4 * max(shape.numel() for shape in weight_shapes(config.model).values())
        copies = 0 if self.on_gpu else ADAM_COPIES * updated
        if config.optimizer_on_cpu:
            return self._beside(gradients=self.own_gradient)
        if self.stage == 3:
            return self._beside(buffers=updated + copies)
        flat = self.own_fp32 if self.stage or self.between.master else 0
        return self._beside(gradients=self.own_gradient + flat, buffers=copies)

    def _beside(self, **parts: int) -> Memory:
        """Return what lies there between steps, with more of some parts."""
        return self.between._replace(**{name: getattr(self.between, name) + size for name, size in parts.items()})


def _between_steps(config: RunConfig, world_size: int) -> Memory:
    stage, offloads, P = config.zero_stage, config.optimizer_on_cpu, total_parameters(config)
    size = weights_dtype(config).itemsize
    # Stages 1 and 2 keep a copy of fp32 weights too.
    has_master = not offloads and (size < 4 or stage in (1, 2))
    shares = world_size if stage else 1
    optimizer = 0 if offloads else (moment_bytes(config) + average_bytes(config)) // shares
    weights = weight_bytes(config) // (world_size if stage == 3 else 1)
    gradients = buffers = 0
    if stage == 3:
        zero = zero_block(config.deepspeed, config.model)
        gathered = int(zero["stage3_max_live_parameters"]) + int(zero["stage3_prefetch_bucket_size"])
        gradients = 0 if offloads else P * gradient_dtype(config).itemsize // world_size
        buffers = (int(zero["reduce_bucket_size"]) + min(P, gathered)) * size
        if config.parameters_on_cpu:
            weights = 0
    return Memory(
        weights=weights,
        master=4 * P // shares if has_master else 0,
        optimizer=optimizer,
        gradients=gradients,
        activations=0,
        loss=0,
        buffers=buffers,
    )


def _passes(config: RunConfig, world_size: int, rank: _Rank) -> Iterator[Memory]:
    """Yield the memory in a pass at the loss, and at each block on the way back."""
    model, tokens, size = config.model, config.train.micro_batch_tokens, gradient_dtype(config).itemsize
    blocks = _blocks(config, world_size)
    kept = _kept(config, blocks)
    of_loss = workspace_bytes(tokens, model.width, model.vocab_size, matmul_dtype(config), rank.on_gpu)
    yield rank.in_pass(0, sum(kept), of_loss)
    embedding = model.vocab_size * model.width * size
    of_block = (rank.gradient - embedding) // len(blocks)
    for done, block in enumerate(reversed(blocks)):
        made = max(embedding, of_block) if rank.stage == 3 else embedding + (done + 1) * of_block
        yield rank.in_pass(made, sum(kept[: len(blocks) - done]) + block.backward, 0)


def kept_activations(config: RunConfig, world_size: int) -> int:
    """Return the bytes that a micro-batch of a rank keeps from its forward pass to its backward pass."""
    return sum(_kept(config, _blocks(config, world_size)))


def _blocks(config: RunConfig, world_size: int) -> list[BlockMemory]:
    sequences = batch_plan(config, world_size).micro_sequences
    length = config.train.micro_batch_tokens // sequences  # ranks that share a context hold a part of it each
    return model_memory(config.model, sequences, length, weights_dtype(config), autocast_dtype(config))


def _kept(config: RunConfig, blocks: Sequence[BlockMemory]) -> list[int]:
    """Return what embedding, blocks and last norm keep for the backward pass, in order.

    Blocks that are computed again keep their output alone, as the embedding and the norm do.
    """
    every = config.train.activation_checkpointing_every or len(blocks) + 1
    stream = config.train.micro_batch_tokens * config.model.width * weights_dtype(config).itemsize
    return [stream, *(block.kept if place % every else stream for place, block in enumerate(blocks, 1)), stream]
