"""Steps whose intermediate results are larger than their inputs, and are not kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Return function(*arguments), of which the arguments alone are kept: the backward pass computes it again."""
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result
