"""Cross-entropy of the output projection, computed over a few rows of logits at a time; and those logits.

torch.nn.functional.linear_cross_entropy does the same, but in bf16 rounds its result to bf16: a loss of 3.21 comes
back as 3.203. Here the loss is always fp32.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from tostlm.autograd import first_order
from tostlm.shapes import Float, Int

IGNORE = -100  # a target that is not scored, as in torch
CHUNK_LOGITS = 1 << 23  # logits alive at once


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


class _SumCrossEntropy(torch.autograd.Function):
    """The sum over targets [N] for x [N, C] and weight [V, C]; the forward pass computes the gradients beside it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, z_loss: float, learns: bool
    ) -> Tensor:
        compute = torch.promote_types(x.dtype, torch.float32)
        total = torch.zeros((), dtype=compute, device=x.device)
        dx = torch.empty_like(x) if learns else None
        dweight = torch.zeros_like(weight, dtype=compute) if learns else None
        chunk = max(1, CHUNK_LOGITS // weight.shape[0])
        for start in range(0, x.shape[0], chunk):
            rows = slice(start, start + chunk)
            scored = (targets[rows] != IGNORE)[:, None]
            target = targets[rows, None].where(scored, 0)
            logits = softcapped((x[rows] @ weight.t()).to(compute), softcap)  # [rows, V]
            slope = None if softcap is None or not learns else 1 - (logits / softcap).square()
            log_sum = logits.logsumexp(-1, keepdim=True)
            total += (log_sum - logits.gather(1, target) + z_loss * log_sum.square()).where(scored, 0).sum()
            if dx is not None and dweight is not None:
                d_logits = logits.sub_(log_sum).exp_()  # softmax, less one at the target
                if z_loss:
                    d_logits.mul_(1 + 2 * z_loss * log_sum)
                d_logits.scatter_add_(1, target, torch.full_like(log_sum, -1))
                if slope is not None:
                    d_logits.mul_(slope)
                d_logits = d_logits.mul_(scored).to(x.dtype)
                dx[rows] = d_logits @ weight
                dweight += d_logits.t() @ x[rows]
        if dx is not None and dweight is not None:
            ctx.save_for_backward(dx, dweight.to(weight.dtype))
        return total

    @staticmethod
    @first_order
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = (d.to(scale.dtype).mul(scale).to(d.dtype) for d in ctx.saved_tensors)
        return dx, dweight, None, None, None, None
