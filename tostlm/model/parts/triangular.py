"""Systems of equations whose matrix is the identity below which something stands."""

from __future__ import annotations

import torch

from tostlm.shapes import Float


def solve_unit_lower(
    M: Float[torch.Tensor, "*batch L L"], right: Float[torch.Tensor, "*batch L V"]
) -> Float[torch.Tensor, "*batch L V"]:
    """Return (I + M)^-1 right; of M [..., L, L] the part below the diagonal counts, the rest must be zero."""
    if not torch.compiler.is_exporting():
        solved: torch.Tensor = torch.linalg.solve_triangular(M, right, upper=False, unitriangular=True)
        return solved
    # ONNX has no such solver. The inverse is the product of I + (-M)^n over the powers of two n below L.
    power, n = -M, 1
    while n < M.shape[-1]:
        right, power, n = right + power @ right, power @ power, 2 * n
    return right
