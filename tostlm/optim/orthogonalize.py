"""Newton-Schulz: the nearest matrix whose singular values are all near 1, by products of matrices alone."""

from __future__ import annotations

import torch
from torch import Tensor

# Of the polynomial a s + b s^3 + c s^5 that each step applies to every singular value s: it lifts small ones fast and
# leaves those near 1 between 0.7 and 1.2. Source: Keller Jordan's Muon (kellerjordan.github.io/posts/muon).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Return U V^T, about, for each of the matrices [..., rows, columns] = U S V^T.

    Args:
        steps: of the iteration, each of three products.
        dtype: of the products, torch.bfloat16 or wider; the result is in the matrices' own.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    orthogonal: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return orthogonal
