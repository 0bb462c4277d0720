"""Cross-covariance attention: channels attend to channels, by how they went together over the tokens so far.

Shapes: B sequences, T tokens, C channels = H heads x D, N chunks of L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from tostlm.model.config import ModelConfig
from tostlm.model.parts.attention import Attention, AttentionOptions
from tostlm.model.parts.forgetting import Forgetting, ForgettingOptions
from tostlm.model.parts.matrix_state import CHUNK, ChunkDecays, carry, chunked
from tostlm.model.parts.recompute import recomputed
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

EPS = 1e-12  # of a channel's squared length
MAP_FLOPS = 10  # per channel of a map, forward: the product, sums from before, the cosine, softmax, reading


@dataclass(frozen=True)
class CrossCovarianceOptions(ForgettingOptions, AttentionOptions):
    """Options of cross-covariance attention: a convolution and a gate as softmax attention has, and forgetting."""

    mixer: Literal["cross_covariance"] = "cross_covariance"

    def __post_init__(self) -> None:
        ForgettingOptions.__post_init__(self)
        AttentionOptions.__post_init__(self)
        if self.rotary_base is not None or self.qk_norm:
            raise ValueError(
                "rotary_base and qk_norm do not go with cross_covariance, which compares channels over the tokens and "
                "not tokens over their channels; leave them out"
            )


class CrossCovarianceState(NamedTuple):
    """Sums over the tokens so far."""

    sums: Tensor  # [B, H, D^2 + 2D] float64, of k_t q_t^T, and of the squares of k_t and of q_t
    tail: Tensor  # [B, max(0, short_conv - 1), 3C]


class CrossCovariance(Attention):
    """y_t[j] = sum over i of softmax over i (temp sum_s k_s[i] q_s[j] / (|k[i]| |q[j]|)) v_t[i], in each head.

    The sum and the lengths |k[i]| and |q[j]| of channels are over the tokens s <= t, which forgetting weighs. Every
    token has a map of D x D channels, C D numbers: they are made for a chunk of tokens at a time, and again in the
    backward pass.

    Source: XCiT (arXiv 2106.09681), whose sums are over all tokens of an image.
    """

    options: CrossCovarianceOptions
    options_class = CrossCovarianceOptions
    state_class = CrossCovarianceState
    constant_state = True
    context_parallel = "sequence"

    def __init__(self, config: ModelConfig, options: CrossCovarianceOptions) -> None:
        super().__init__(config, options)
        self.forgetting = Forgetting(options, config.width, config.heads)
        self.temp = nn.Parameter(torch.empty(config.heads))  # one over the temperature, as in the authors' release

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        positions: SequencePositions,
        state: CrossCovarianceState | None,
        added_values: Tensor | None = None,
    ) -> tuple[Float[Tensor, "B T C"], CrossCovarianceState]:
        sums, tail = (None, None) if state is None else state
        q, k, v, tail = self.project(x, positions, tail, added_values)
        with torch.autocast(x.device.type, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            q, k, v = (z.to(wide).transpose(1, 2) for z in (q, k, v))  # [B, T, H, D]
            y, sums = self._mix(
                q, k, v, ChunkDecays.build(self.forgetting(x), positions, *q.shape[:2]), positions, sums
            )
        return self.finish(y.to(x.dtype), x), CrossCovarianceState(sums, tail)

    def _mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decays: ChunkDecays,
        positions: SequencePositions,
        before: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return y [B, H, T, D] of queries, keys and values [B, T, H, D], and the sums after them."""
        B, T, H, _ = q.shape
        q, k, v = (chunked(z, decays.length) for z in (q, k, v))  # [B, N, H, L, D]
        weights = decays.to_end[..., None]
        products = (k * weights).transpose(-1, -2) @ q  # [B, N, H, D, D]
        added = torch.cat([products.flatten(3), *((weights * z.square()).sum(3) for z in (k, q))], -1)
        if before is None:
            before = q.new_zeros(B, H, added.shape[-1], dtype=torch.float64)
        kept = decays.whole.double()[..., None, None]
        carried, after = carry(added.double()[..., None, :], kept, before[:, :, None], positions.group)
        chunks = [q, k, v, decays.pairs, decays.from_start, carried.to(q.dtype)]
        y = [recomputed(self._read, *parts) for parts in zip(*(z.unbind(1) for z in chunks), strict=True)]
        return torch.cat(y, 2)[:, :, :T], after[:, :, 0]

    def _read(self, q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, from_start: Tensor, carried: Tensor) -> Tensor:
        """Return y [B, H, L, D] of a chunk, of the sums that come into it [B, H, 1, D^2 + 2D]."""
        D = q.shape[-1]
        own = torch.cat([(k[..., :, None] * q[..., None, :]).flatten(3), k.square(), q.square()], -1)
        sums = pairs @ own + from_start[..., None] * carried  # [B, H, L, D^2 + 2D]
        products, lengths = sums.split([D * D, 2 * D], -1)
        k_length, q_length = lengths.clamp_min(EPS).sqrt().chunk(2, -1)
        cosines = products.unflatten(-1, (D, D)) / (k_length[..., :, None] * q_length[..., None, :])
        shares = (self.temp.to(q.dtype)[:, None, None, None] * cosines).softmax(-2)  # [B, H, L, D, D]
        y: Tensor = v[..., None, :] @ shares
        return y[..., 0, :]

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator) -> None:
        super().reset_parameters(generator)
        self.forgetting.reset_parameters(self.config.init_std, generator)
        self.temp.fill_(1.0)

    def flops_per_token(self, context: int) -> float:
        C, D, L = self.config.width, self.config.width // self.config.heads, min(CHUNK, context)
        # What a token adds to its chunk's sums, half a chunk's pairs on average, and its map.
        return self.projection_flops() + C * D * (2 + 2 * L / 2 + MAP_FLOPS)

    def state_bytes(self, context: int) -> int:
        D = self.config.width // self.config.heads
        return 8 * self.config.width * (D + 2) + self.tail_bytes()
