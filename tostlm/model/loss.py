"""Cross-entropy of the output projection, computed over a few rows of logits at a time; and those logits.

torch.nn.functional.linear_cross_entropy does the same, but in bf16 rounds its result to bf16: a loss of 3.21 comes
back as 3.203. Here the loss is always fp32.
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tostlm.autograd import first_order
from tostlm.shapes import Float, Int

IGNORE = -100  # a target that is not scored, as in torch


class Sizes(NamedTuple):
    """Bytes alive at once: of the logits for which the weight is read once, and of what is computed of them."""

    logits: int
    block: int  # in fp32: on a CPU what its caches hold


CPU, GPU = Sizes(40 << 20, 4 << 20), Sizes(512 << 20, 256 << 20)
BLOCKS = 2  # of fp32 numbers alive at once: the logits, and their log-probabilities


def perplexity(nats: float) -> float:
    """Return the perplexity of a mean loss in nats a token; infinity where no float holds it."""
    return math.exp(nats) if nats < math.log(sys.float_info.max) else math.inf


def softcapped(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap tanh(logits / softcap), which no logit leaves; None returns them as they are.

    Source: Gemma 2 (arXiv 2408.00118).
    """
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def mean_cross_entropy(
    x: Float[Tensor, "*N C"],
    weight: Float[Tensor, "V C"],
    targets: Int[Tensor, "*N"],
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Float[Tensor, ""]:
    """Return the mean cross-entropy in nats of predicting targets by softmax(x weight^T), in fp32 or wider.

    x [..., C] is the normalized residual stream, weight [V, C] the output projection, and targets [...] are int64,
    `IGNORE` where nothing is scored. The logits x weight^T are softcapped before. With `z_loss` that times the mean of
    (log of softmax's denominator)^2 is added, which keeps logits from drifting (PaLM, arXiv 2204.02311).
    """
    scored = (targets != IGNORE).sum().clamp_min(1)
    learns = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    total: Tensor = _SumCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), softcap, z_loss, learns)  # type: ignore[no-untyped-call]
    return total / scored


def workspace_bytes(tokens: int, channels: int, vocab_size: int, dtype: torch.dtype, on_gpu: bool) -> int:
    """Return the bytes that `mean_cross_entropy` of fp32 inputs holds at most beside them, its gradients among these.

    Args:
        tokens, channels, vocab_size: N, C and V.
        dtype: what products are computed in, under autocast or in the inputs' own.
    """
    sizes = GPU if on_gpu else CPU
    rows, of_block = min(tokens, _rows_in(sizes.logits, vocab_size, dtype)), _rows_in(sizes.block, vocab_size, dtype)
    cast = 0 if dtype == torch.float32 else vocab_size * channels * dtype.itemsize
    gradients = tokens * channels * dtype.itemsize + vocab_size * channels * 4
    logits = rows * (vocab_size + channels) * dtype.itemsize
    return cast + gradients + logits + BLOCKS * min(rows, of_block) * vocab_size * 4


class _SumCrossEntropy(torch.autograd.Function):
    """The sum over targets [N] for x [N, C] and weight [V, C]; the forward pass computes the gradients beside it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, z_loss: float, learns: bool
    ) -> Tensor:
        device, dtype = x.device.type, x.dtype
        compute = torch.promote_types(dtype, torch.float32)
        if torch.is_autocast_enabled(device) and compute == torch.float32:
            dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            ctx.dtypes = x.dtype, weight.dtype
            weight = weight.to(dtype)  # once, not for every chunk
            total = torch.zeros((), dtype=compute, device=x.device)
            dx = torch.empty_like(x, dtype=dtype) if learns else None
            dweight = torch.zeros_like(weight, dtype=compute) if learns else None
            sizes = CPU if device == "cpu" else GPU
            chunk = _rows_in(sizes.logits, weight.shape[0], dtype)
            for start in range(0, x.shape[0], chunk):
                rows = slice(start, start + chunk)
                ignored = (targets[rows] == IGNORE)[:, None]
                read = x[rows].to(dtype).masked_fill(ignored, 0)
                logits = read @ weight.t()  # [rows, V]
                total += _loss_and_slopes(logits, targets[rows], softcap, z_loss, learns, sizes.block)
                if dx is not None and dweight is not None:
                    torch.mm(logits, weight, out=dx[rows]).masked_fill_(ignored, 0)
                    _add_product(dweight, logits.t(), read, sizes.block)
                del logits  # else the next ones are made beside them
            ctx.gradients = None if dx is None else (dx, dweight)
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of the loss was made already, in place; compute the loss again")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        of_x, of_weight = ctx.dtypes
        return (dx.to(scale.dtype) * scale).to(of_x), dweight.mul_(scale).to(of_weight), None, None, None, None


def _loss_and_slopes(
    logits: Tensor, targets: Tensor, softcap: float | None, z_loss: float, learns: bool, block_bytes: int
) -> Tensor:
    """Return the sum of the losses of logits [N, V]; if the model `learns`, turn them into their own gradient.

    Rows that are not scored get one as if they were. A few rows at a time are computed, in fp32 or wider.
    """
    compute = torch.promote_types(logits.dtype, torch.float32)
    total = torch.zeros((), dtype=compute, device=logits.device)
    count = _rows_in(block_bytes, logits.shape[1], compute)
    for block, labels in zip(logits.split(count), targets[:, None].split(count), strict=True):
        scored = labels != IGNORE  # [rows, 1]
        label = labels.where(scored, 0)
        capped = softcapped(block.to(compute), softcap)
        log_p = torch.log_softmax(capped, -1)
        loss = -log_p.gather(1, label)
        log_sum = capped.gather(1, label) + loss if z_loss else None  # of softmax's denominator
        if log_sum is not None:
            loss = loss + z_loss * log_sum.square()
        total += loss.where(scored, 0).sum()
        if learns:
            slopes = log_p.exp_()  # softmax, less one at the target
            if log_sum is not None:
                slopes.mul_(1 + 2 * z_loss * log_sum)
            slopes.scatter_add_(1, label, slopes.new_full(label.shape, -1))
            if softcap is not None:
                slopes.mul_(1 - (capped / softcap).square_())
            block.copy_(slopes)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor, block_bytes: int) -> None:
    """Add a [V, N] times b [N, C] to a total [V, C], of another dtype maybe, without a second tensor of that size."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
        return
    count = _rows_in(block_bytes, b.shape[1], b.dtype)
    for part, rows in zip(total.split(count), a.split(count), strict=True):
        part += rows @ b


def _rows_in(size: int, columns: int, dtype: torch.dtype) -> int:
    """Return how many rows of a tensor take `size` bytes; one at least."""
    return max(1, size // (columns * dtype.itemsize))
