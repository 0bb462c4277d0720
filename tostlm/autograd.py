"""What the project's own autograd functions and operations share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch


def namespace(module: str) -> str:
    """Return a namespace of `torch.library` for the operations of a module: its name, dots as underscores.

    Every copy of a module has its own: an exported model brings one in a module named after its folder, and two of them
    may be loaded at once. So what such a folder's name has besides letters and digits is written as its code.
    """
    return re.sub(r"[^A-Za-z0-9]", lambda found: "_" if found[0] == "." else f"__{ord(found[0]):x}__", module)


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
