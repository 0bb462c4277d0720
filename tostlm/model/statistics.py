"""What the layers of a model can say of a forward pass: of its activations, and what their mixers define."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tostlm.model.mixers.base import Mixer


@contextmanager
def layer_statistics(blocks: Sequence[nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Give a dict in which every forward pass leaves scalars by name and layer, in place of those before.

    activation_rms/0 is the root mean square of what block 0 leaves in the residual stream; others, such as entropy/0,
    are those of `Mixer.statistics`.
    """
    found: dict[str, Tensor] = {}

    def of_mixer(layer: int, mixer: Mixer, inputs: tuple[Any, ...], output: object) -> None:
        x, positions, state, *_ = inputs
        found.update({f"{name}/{layer}": value for name, value in mixer.statistics(x, positions, state).items()})

    def of_block(layer: int, block: nn.Module, inputs: object, output: tuple[Tensor, Any]) -> None:
        found[f"activation_rms/{layer}"] = output[0].float().square().mean().sqrt()

    hooks = []
    for layer, block in enumerate(blocks):
        hooks.append(block.register_forward_hook(partial(of_block, layer)))
        mixer = block.mixer
        if isinstance(mixer, Mixer) and type(mixer).statistics is not Mixer.statistics:
            # It must run before DeepSpeed's own hook, which releases the layer's parameters at stage 3.
            hooks.append(mixer.register_forward_hook(partial(of_mixer, layer), prepend=True))
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not call hooks
            yield found
    finally:
        for hook in hooks:
            hook.remove()
