"""Causal softmax attention over contexts of packed documents, without a mask of tokens by tokens.

Shapes: B sequences, S queries, the last of R keys and values each, H heads x D.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tostlm.model.positions import Spans
from tostlm.shapes import Float

ROWS = 256  # queries at a time where a span has keys before its queries: their mask has so many rows


def attend_causal(
    q: Float[Tensor, "B H S D"],
    k: Float[Tensor, "B H R D"],
    v: Float[Tensor, "B H R D"],
    spans: Spans | None,
    step_mask: Tensor | None,
) -> Float[Tensor, "B H S D"]:
    """Return what every query reads of its document, up to the key of its own token.

    Args:
        spans: where the documents lie, as `SequencePositions` has them; None where every query's begins with the keys.
        step_mask: [B, 1, S, R], which keys the queries may read where there are no spans; None for all up to their own.
    """
    if spans is None:
        plainly = step_mask is None and q.shape[2] > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=step_mask, is_causal=plainly)
    B, H, S, D = q.shape
    if _has_varlen(q):
        from torch.nn.attention.varlen import varlen_attn  # it imports the compiler, which takes seconds

        queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B S or B R, H, D]
        y = varlen_attn(queries, keys, values, spans.queries, spans.keys, S, k.shape[2], window_size=(-1, 0))
        assert isinstance(y, Tensor)
        return y.view(B, S, H, D).transpose(1, 2)
    # Where spans lie is known when it runs, not when it is compiled; disabling imports the compiler.
    attend = torch.compiler.disable(_attend_spans) if torch.compiler.is_compiling() else _attend_spans
    queries, keys, values = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))  # [H, B S or B R, D]
    return attend(queries, keys, values, spans).view(H, B, S, D).transpose(0, 1)


def _has_varlen(q: Tensor) -> bool:
    """Return whether FlashAttention's variable-length kernels serve queries like these."""
    if q.device.type != "cuda" or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
    """Return what queries [H, B S, D] read of keys and values [H, B R, D], span by span."""
    queries, keys = (bounds.diff().tolist() for bounds in spans)
    # Views of one split have one gradient between them, where slices would have a whole one each.
    pieces = zip(q.split(queries, 1), k.split(keys, 1), v.split(keys, 1), strict=True)
    return torch.cat([_attend_span(*(x[None] for x in piece))[0] for piece in pieces if piece[0].shape[1]], 1)


def _attend_span(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what queries [1, H, n, D] read of keys and values [1, H, m, D], of which the last n are their own."""
    before = k.shape[2] - q.shape[2]
    if not before:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    read = []
    for rows in q.split(ROWS, 2):
        end = before + rows.shape[2]
        mask = torch.ones(rows.shape[2], end, dtype=torch.bool, device=q.device).tril(before)
        read.append(F.scaled_dot_product_attention(rows, k[:, :, :end], v[:, :, :end], attn_mask=mask))
        before = end
    return torch.cat(read, 2)
