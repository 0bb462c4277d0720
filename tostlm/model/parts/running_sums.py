"""Running sums of vectors, x_t = a_t x_{t-1} + v_t, in chunks of tokens.

Inside a chunk they are one product of matrices, in fp32 or float64 as v is; between chunks sums are float64, because a
sum over a million tokens loses its newest terms in anything narrower.

Shapes: B sequences, T tokens, H heads, K numbers a head.
"""

from __future__ import annotations

from torch import Tensor

from tostlm.model.parts.matrix_state import CHUNK, ChunkDecays, carry, chunked
from tostlm.model.positions import SequencePositions


def running_sums(v: Tensor, decays: ChunkDecays, positions: SequencePositions, state: Tensor) -> tuple[Tensor, Tensor]:
    """Return x [B, T, H, K], each token's own v included, and x after the last token of all ranks [B, H, K] in float64.

    Args:
        v: [B, T, H, K].
        decays: of a_t, as `ChunkDecays.build` makes them for these tokens.
        state: [B, H, K] float64, x before the first token of the call.
    """
    T = v.shape[1]
    v = chunked(v, decays.length)  # [B, N, H, L, K]
    added = (decays.to_end[..., None, :] @ v).double()  # [B, N, H, 1, K], by each chunk
    kept = decays.whole.double()[..., None, None]
    carried, last = carry(added, kept, state[:, :, None], positions.group)
    x = decays.pairs @ v + decays.from_start[..., None] * carried.to(v.dtype)
    return x.transpose(2, 3).flatten(1, 2)[:, :T], last[:, :, 0]


def running_sums_flops(numbers: int, context: int) -> float:
    """Return the floating-point operations per token of the running sums of `numbers` = H K, over `context` tokens."""
    # Half a chunk's pairs on average; what comes into a chunk, and what leaves it.
    return 2.0 * numbers * (min(CHUNK, context) / 2 + 2)
