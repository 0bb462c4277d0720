"""Whether a run fits into the memory of its accelerators, and which settings would make it fit or fill it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tostlm.accelerators import GIB
from tostlm.config import RunConfig, batch_plan
from tostlm.errors import UserError
from tostlm.model import MIXERS
from tostlm.plan.memory import memory

Changes = dict[str, int]  # of settings, by their keys

STAGE = "deepspeed.zero_optimization.stage"
MICRO_BATCH = "train.micro_batch_tokens"
CHECKPOINTING = "train.activation_checkpointing_every"
GROUP = "train.context_parallel_size"
USABLE = 0.92  # of a device's memory: the rest is torch's, NCCL's, and what an allocator cannot use


def fits(need: float, memory_bytes: float) -> bool:
    """Return whether a device with so many bytes of memory has `need` bytes for a run."""
    return need <= USABLE * memory_bytes


def require_fit(config: RunConfig, world_size: int, memory_bytes: float, on_gpu: bool, limit: str) -> None:
    """Raise a UserError that says what to change where a run does not fit into the memory of each of its ranks.

    Args:
        memory_bytes: of each rank's device.
        limit: what the error calls that memory.
    """
    need = memory(config, world_size, on_gpu).total
    if not fits(need, memory_bytes):
        raise UserError(
            f"the run takes {need / GIB:.3g} GiB per rank on {world_size} ranks, above {limit}, of which "
            f"{1 - USABLE:.0%} are needed otherwise; {way_out(config, world_size, memory_bytes, on_gpu)}"
        )


def way_out(config: RunConfig, world_size: int, memory_bytes: float, on_gpu: bool) -> str:
    """Return the settings, as on the command line, that let a run fit; the first of those that cost least time."""
    found = _first_that_fits(_smaller(config, world_size), config, world_size, memory_bytes, on_gpu)
    if found is None:
        return (
            "no ZeRO stage, micro-batch or activation checkpointing makes it fit: start more ranks, or larger devices"
        )
    return f"set {_settings(found)}"


def _first_that_fits(
    candidates: Iterable[Changes], config: RunConfig, world_size: int, memory_bytes: float, on_gpu: bool
) -> Changes | None:
    for changes in candidates:
        changed = changed_config(config, changes)
        if _divides(changed, world_size) and fits(memory(changed, world_size, on_gpu).total, memory_bytes):
            return changes
    return None


def _smaller(config: RunConfig, world_size: int) -> Iterator[Changes]:
    """Yield changes of settings that take less memory, those first that cost less time."""
    own, recomputed = config.train.micro_batch_tokens, {CHECKPOINTING: 1}
    stages: list[Changes] = [{STAGE: stage} for stage in range(config.zero_stage + 1, 4) if world_size > 1]
    smaller = [tokens for tokens in micro_batches_of(config, world_size) if tokens < own]
    micro_batches: list[Changes] = [{MICRO_BATCH: tokens} for tokens in reversed(smaller)]
    yield from stages
    yield from micro_batches
    yield from ({**stage, **micro_batch} for stage in stages for micro_batch in micro_batches)
    smallest = micro_batches[-1] if micro_batches else {}
    yield from ({**stage, **smallest, **recomputed} for stage in [{}, *stages])
    for group in _groups(config, world_size):
        alone = {GROUP: group, MICRO_BATCH: config.data.context_tokens // group}
        yield from ({**stage, **alone, **each} for stage in [{}, *stages] for each in ({}, recomputed))


def changed_config(config: RunConfig, changes: Changes) -> RunConfig:
    """Return a run's config with other values of the settings that matter to memory."""
    changes = dict(changes)
    deepspeed = config.deepspeed
    if STAGE in changes:
        zero = {**deepspeed.get("zero_optimization", {}), "stage": changes.pop(STAGE)}
        deepspeed = {**deepspeed, "zero_optimization": zero}
    train = config.train.model_copy(update={key.removeprefix("train."): value for key, value in changes.items()})
    return config.model_copy(update={"deepspeed": deepspeed, "train": train})


def micro_batches_of(config: RunConfig, world_size: int) -> list[int]:
    """Return the micro-batches, in tokens of a rank, into which ranks can divide every step of a run."""
    groups, context = world_size // config.train.context_parallel_size, config.data.context_tokens
    sequences = [stage.batch_tokens // context // groups for stage in config.stages]
    counts = range(1, min(sequences, default=0) + 1)
    tokens = (count * context // config.train.context_parallel_size for count in counts)
    return [each for each in tokens if _divides(changed_config(config, {MICRO_BATCH: each}), world_size)]


def _groups(config: RunConfig, world_size: int) -> Sequence[int]:
    """Return the larger numbers of ranks that could share a context."""
    ways = {MIXERS[options.mixer].context_parallel for options in config.model.layers}
    if None in ways:
        return []
    return [
        group
        for group in range(config.train.context_parallel_size + 1, min(world_size, 64) + 1)
        if world_size % group == 0
        and config.data.context_tokens % group == 0
        and ("heads" not in ways or config.model.heads % group == 0)
    ]


def _divides(config: RunConfig, world_size: int) -> bool:
    """Return whether ranks can divide every step of a run into its micro-batches."""
    tokens = config.train.micro_batch_tokens * config.train.context_parallel_size
    if any(tokens % stage.context_tokens for stage in config.stages):
        return False
    try:
        batch_plan(config, world_size)
    except UserError:
        return False
    return True


def advice(config: RunConfig, world_size: int, memory_bytes: float, on_gpu: bool) -> list[str]:
    """Return what a user may want to change: the smallest stage, largest micro-batch and whole contexts that fit."""
    if not fits(memory(config, world_size, on_gpu).total, memory_bytes):
        return [way_out(config, world_size, memory_bytes, on_gpu)]
    train, context = config.train, config.data.context_tokens
    larger = [tokens for tokens in micro_batches_of(config, world_size) if tokens > train.micro_batch_tokens]
    whole = [{GROUP: 1, MICRO_BATCH: context}] if train.context_parallel_size > 1 else []
    offloads = config.optimizer_on_cpu or config.parameters_on_cpu  # which lower stages cannot
    stages = range(config.zero_stage) if world_size > 1 and not offloads else ()
    better = {
        "is enough": [{STAGE: stage} for stage in stages],
        "fits too, in fewer passes": [{MICRO_BATCH: tokens} for tokens in reversed(larger)],
        "fits too: contexts need not be split": whole,
    }
    found = (
        (_first_that_fits(candidates, config, world_size, memory_bytes, on_gpu), why)
        for why, candidates in better.items()
    )
    return [f"{_settings(changes)} {why}" for changes, why in found if changes is not None]


def _settings(changes: Changes) -> str:
    """Return settings as the command line takes them."""
    return " ".join(f"{key}={value}" for key, value in changes.items())
