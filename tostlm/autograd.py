"""What the project's own autograd functions share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make the backward pass of a `torch.autograd.Function` an error where a second derivative is asked for.

    torch's `once_differentiable` notices only incoming gradients that require gradients: what is saved then counts as a
    constant, and second derivatives are wrong without an error.

    Raises:
        RuntimeError: of the result, when it is called by `create_graph=True`.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(f"{backward.__qualname__} has no second derivative; call it without create_graph=True")
        return backward(ctx, *grads)

    return checked
