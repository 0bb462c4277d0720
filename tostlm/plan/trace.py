"""What a block of a model holds in memory while it is trained, found by running it on tensors without data."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tostlm.model import MixerOptions, ModelConfig
from tostlm.model.block import Block, Bottom
from tostlm.model.positions import SequencePositions

TRACED_TOKENS = 2048  # of a sequence, at most: beyond them a block's memory grows as it did up to there


class BlockMemory(NamedTuple):
    """Bytes that a training pass through one block of a model adds, beside its weights and its input."""

    kept: int  # from the forward pass to the backward pass
    forward: int  # at most during the forward pass, `kept` among them
    backward: int  # at most during the backward pass, `kept` among them, without the weights' gradients


class _Line(NamedTuple):
    """Bytes of a pass over any number of sequences of one length."""

    fixed: int
    per_sequence: int

    def at(self, sequences: float) -> int:
        return int(self.fixed + self.per_sequence * sequences)


def block_memory(
    config: ModelConfig, layer: int, sequences: int, tokens: int, weights: torch.dtype, autocast: torch.dtype | None
) -> BlockMemory:
    """Return what a block of a model holds in a training pass on a CPU.

    GPUs hold the same, but for what their kernels do in registers.

    Args:
        layer: the block's place in the model.
        sequences, tokens: B and T of the pass.
        weights: dtype of the weights.
        autocast: what torch.autocast computes products in; None without it.
    """
    traced = min(tokens, TRACED_TOKENS)
    kind = _Kind(config.layer_plan[layer], layer > 0)
    lines = _trace_lines(config, kind, traced, weights, autocast)
    return BlockMemory(*(line.at(sequences * tokens / traced) for line in lines))


class _Kind(NamedTuple):
    """What blocks of a model differ in."""

    options: MixerOptions
    later: bool  # not the first: only later blocks take what is skipped over


@functools.cache
def _trace_lines(
    config: ModelConfig, kind: _Kind, tokens: int, weights: torch.dtype, autocast: torch.dtype | None
) -> tuple[_Line, ...]:
    one, two = (_trace(config, kind, sequences, tokens, weights, autocast) for sequences in (1, 2))
    return tuple(_Line(2 * a - b, b - a) for a, b in zip(one, two, strict=True))


def _trace(
    config: ModelConfig, kind: _Kind, sequences: int, tokens: int, weights: torch.dtype, autocast: torch.dtype | None
) -> BlockMemory:
    """Return what one block holds in a training pass over so many sequences of `tokens`."""
    with FakeTensorMode():
        with _default_dtype(weights):
            block, first = Block(config, kind.options, int(kind.later)), Block(config, config.layer_plan[0], 0)
        x = torch.empty(sequences, tokens, config.width, dtype=weights, requires_grad=True)
        positions = SequencePositions.build(
            torch.empty(sequences, tokens, dtype=torch.int64), 0, None, None, block.mixer.needs_spans, None
        )
        precision = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
        with precision, torch.no_grad():
            values = first.values(x) if config.value_residual else None
        bottom = Bottom(x if config.embed_skip else None, None if values is None else values.requires_grad_())
        held = [*block.parameters(), x, *(() if values is None else (values,))]
        with LiveBytes(held) as live:
            with precision:
                y, state = block(x, positions, None, bottom)
            forward, kept = live.peak, live.bytes
            live.restart()
            grads = torch.autograd.grad(y, [x, *block.parameters()], torch.empty_like(y), allow_unused=True)
            weight_grads = sum(each.nbytes for each in grads[1:] if each is not None)
            del state
            return BlockMemory(kept, forward, live.peak - weight_grads)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let modules that are made inside have parameters of a dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made inside, as long as something holds them.

    Attributes:
        bytes: of those that are held now.
        peak: the most that `bytes` was since the start or `restart`.
    """

    def __init__(self, known: Sequence[Tensor] = ()) -> None:
        """Count nothing that shares memory with one of `known`."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = 0
        self._known = {each.untyped_storage()._cdata for each in known}

    def restart(self) -> None:
        """Let `peak` begin again."""
        self.peak = self.bytes

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                self._hold(made.untyped_storage())
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size


def model_memory(
    config: ModelConfig, sequences: int, tokens: int, weights: torch.dtype, autocast: torch.dtype | None
) -> list[BlockMemory]:
    """Return `block_memory` of every block of a model, in order."""
    return [
        block_memory(config, layer, sequences, tokens, weights, autocast) for layer in range(len(config.layer_plan))
    ]
