"""Combiner: softmax attention to the tokens of a block, and to every earlier block through one summary of it.

Shapes: B sequences, T tokens of this rank, C channels = H heads x D, S tokens of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.near_attention import Further, attend_near, with_neighbours
from tostlm.model.positions import SequencePositions
from tostlm.parallel import all_gather
from tostlm.shapes import Float


@dataclass(frozen=True)
class CombinerOptions(AttentionOptions):
    """Options of Combiner: those of softmax attention, the blocks, and what stands for them."""

    mixer: Literal["combiner"] = "combiner"
    block_tokens: int = 64
    pooling: Literal["max", "mean"] = "max"  # of a block's queries and of its keys, by channel

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_tokens < 2:
            raise ValueError(f"block_tokens {self.block_tokens} must be 2 or more")
        if self.rotary_base is not None and self.pooling == "max":
            raise ValueError(
                f"rotary_base {self.rotary_base} does not go with pooling: max, which takes the largest of each "
                "channel after turning; use pooling: mean, or leave rotary_base out"
            )


class CombinerState(NamedTuple):
    """What a block's summary is yet to be made of, and the summaries.

    Place n of N = ceil(context / S) holds the summary of the block that ended at tokens n S to n S + S - 1 of the
    context, of which there is at most one, wherever documents start; zeros where none ended.
    """

    last: Tensor  # [B, S - 1, 3C], queries, keys and values of the last tokens, zeros where there were fewer
    keys: Tensor  # [B, H, N, D]
    values: Tensor  # [B, H, N, D]
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class Combiner(Attention):
    """Softmax over the tokens of the own block up to the token itself, and over the summaries of the blocks before.

    A block's summary has the key pool(k), and the value that its pooled query reads in it: softmax(k pool(q) / sqrt(D))
    over its tokens, times v. So attention is full, of a context of T tokens in T (S + T / S) pairs, and the state grows
    by a summary every S tokens. Blocks are counted from a document's first token: where a context is cut does not
    matter, and none has tokens of two documents.

    Source: Combiner-Fixed (arXiv 2107.05768), causal.
    """

    options: CombinerOptions
    options_class = CombinerOptions
    state_class = CombinerState
    constant_state = False
    context_parallel = "sequence"

    def __init__(self, config: ModelConfig, options: CombinerOptions) -> None:
        super().__init__(config, options)
        self.block = options.block_tokens

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: CombinerState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], CombinerState]:
        q, k, v, tail = self.project(x, positions, None if state is None else state.tail, added_values)
        qkv, last = with_neighbours((q, k, v), None if state is None else state.last, self.block - 1, positions)
        with torch.autocast(x.device.type, enabled=False):
            keys, values = self._summaries(qkv, positions, state)
        further = Further(keys, values, self._readable(positions))
        y = attend_near(q, qkv[..., self.config.width :], positions.positions % self.block, self.block, further)
        return self.finish(y, x), CombinerState(last, keys, values, tail)

    def _summaries(
        self, qkv: Tensor, positions: SequencePositions, state: CombinerState | None
    ) -> tuple[Tensor, Tensor]:
        """Return the keys and values of all summaries [B, H, N, D], of qkv [B, S - 1 + T, 3C] and those before."""
        S, total = self.block, -(-positions.end // self.block)
        first, found = self._ended(qkv, positions)
        past = positions.start  # of this call, of all ranks
        if positions.group is not None:
            past -= positions.group.rank() * positions.positions.shape[-1]
            own = F.pad(found, (0, 0, first - past // S, total - first - found.shape[2]))
            first, found = past // S, all_gather(own, positions.group).sum(0)
        # Each place is filled once, here, by another rank or before: so what they hold adds up.
        found = F.pad(found, (0, 0, first, 0))
        if state is not None:
            before = torch.cat([state.keys, state.values], -1)
            found = found + F.pad(before, (0, 0, 0, total - before.shape[2]))
        keys, values = found.chunk(2, -1)
        return keys.contiguous(), values.contiguous()

    def _ended(self, qkv: Tensor, positions: SequencePositions) -> tuple[int, Tensor]:
        """Return the first place that this rank's tokens may fill, and summaries from there on [B, H, n, 2D]."""
        S, T, H = self.block, positions.positions.shape[-1], self.config.heads
        first, skipped = divmod(positions.start, S)
        counts = torch.atleast_2d(positions.positions + 1)  # [1 or B, T], tokens of the document so far
        counts = F.pad(counts, (skipped, -(skipped + T) % S), value=1).unflatten(1, (-1, S))  # [1 or B, n, S]
        ends = counts % S == 0
        ended, place = ends.any(-1), ends.int().argmax(-1)
        places = torch.arange(ends.shape[1], device=qkv.device) * S
        start = (places + place - skipped).where(ended, 0)  # of the block, S - 1 tokens before its end, in qkv
        index = start[..., None] + torch.arange(S, device=qkv.device)  # [1 or B, n, S]
        rows = torch.arange(qkv.shape[0], device=qkv.device)[:, None, None]
        wide = torch.promote_types(qkv.dtype, torch.float32)
        tokens = qkv[rows, index].to(wide).unflatten(-1, (3, H, -1))  # [B, n, S, 3, H, D]
        q, k, v = tokens.permute(3, 0, 4, 1, 2, 5)  # each [B, H, n, S, D]
        q, key = (x.amax(3) if self.options.pooling == "max" else x.mean(3) for x in (q, k))
        value = F.scaled_dot_product_attention(q[..., None, :], k, v)[..., 0, :]
        return first, torch.cat([key, value], -1) * ended[:, None, :, None]

    def _readable(self, positions: SequencePositions) -> Tensor:
        """Return which summaries this rank's tokens may read [1 or B, T, N]: of earlier blocks of their document."""
        S, device = self.block, positions.positions.device
        own = positions.positions
        numbers = torch.arange(positions.start, positions.start + own.shape[-1], device=device)
        document = torch.atleast_2d(numbers - own)[..., None]  # [1 or B, T, 1], number of its first token
        block = torch.atleast_2d(numbers - own % S)[..., None]  # of the token's block
        # Where a block of the document ends at the tokens of each place.
        ends = torch.arange(-(-positions.end // S), device=device) * S + (document - 1) % S  # [1 or B, T, N]
        readable: Tensor = (ends >= document) & (ends < block)
        return readable

    def flops_per_token(self, context: int) -> float:
        # Half a block and half the summaries on average; then the summary, of which every token is read once.
        read = min(self.block, context) / 2 + max(0, context - self.block) / self.block / 2
        return self.projection_flops() + 4 * self.config.width * (read + 1)

    def state_bytes(self, context: int) -> int:
        summaries = -(-context // self.block)
        return 4 * self.config.width * (3 * (self.block - 1) + 2 * summaries) + self.tail_bytes()
