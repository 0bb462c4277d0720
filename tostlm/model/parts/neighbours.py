"""The last few tokens before the ones at hand, which short convolutions and windows still reach.

Shapes: B sequences, T tokens of this rank, K channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tostlm.model.positions import SequencePositions
from tostlm.parallel import all_gather


def neighbours(x: Tensor, tail: Tensor | None, kept: int, positions: SequencePositions) -> tuple[Tensor, Tensor]:
    """Return the `kept` tokens before this rank's, and the last `kept` of all ranks that share the context.

    Args:
        x: [B, T, K], this rank's tokens.
        tail: [B, kept, K], what an earlier call returned; None, which counts as zeros, at the start of a context.

    Returns:
        Both [B, kept, K], in fp32 or wider, which holds narrower numbers exactly.
    """
    B, T, K = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    if tail is None:
        tail = x.new_zeros(B, kept, K, dtype=wide)
    ends = x[:, max(0, T - kept) :].to(wide)  # [B, min(T, kept), K]
    if positions.group is None:
        return tail, _last(torch.cat([tail, ends], 1), kept)
    # Cut out of one tensor, each rank's neighbours depend on every rank's tokens: so every rank calls the backward
    # pass of the gather, the first rank too.
    everything = torch.cat([tail, all_gather(ends, positions.group).movedim(0, 1).flatten(1, 2)], 1)
    own = kept + positions.group.rank() * ends.shape[1]
    return everything[:, own - kept : own], _last(everything, kept)


def predecessors(x: Tensor, last: Tensor | None, positions: SequencePositions) -> tuple[Tensor, Tensor]:
    """Return what is before each token of x [B, T, K] in its document, in x's dtype: zeros at a document's first token.

    And the last token of all ranks that share the context [B, 1, K], as `neighbours` returns it and takes `last`.
    """
    before, after = neighbours(x, last, 1, positions)
    previous = torch.cat([before.to(x.dtype), x], 1)[:, : x.shape[1]]
    if positions.document_start is not None:
        previous = previous * (positions.positions >= 1)[..., None]
    return previous, after


def _last(x: Tensor, kept: int) -> Tensor:
    return x[:, x.shape[1] - kept :].clone()  # a view would keep all of x alive
