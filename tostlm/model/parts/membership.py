"""A head's share of a token, as TSSA has it, in the form that does not depend on how much a head remembers.

Shapes: B sequences, T tokens, H heads, D channels of a head.
"""

from __future__ import annotations

from torch import Tensor

from tostlm.tssa.reference import EPS


def scale_free_logits(squares: Tensor, energy: Tensor, remembered: Tensor, D: int) -> Tensor:
    """Return n = sqrt(D) (N |w|^2 / s - 1) [B, T, H], whose softmax over the heads is the membership.

    It is how much of what a head remembers the token is, against the mean token's part: 0 for a token of mean length.
    No channel alone stands in a denominator.

    Args:
        squares: [B, T, H], |w|^2 of each token.
        energy: [B, T, H], s, the running sum of `squares`, the token's own included.
        remembered: [B, T, H], N, the running sum of 1, in tokens.
    """
    n: Tensor = D**0.5 * (remembered * squares / energy.clamp_min(EPS) - 1)
    return n
