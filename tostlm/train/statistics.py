"""What the TSSA layers of a model in training do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tostlm.model import Mixer
from tostlm.train.batches import Batch


@torch.no_grad()
def layer_statistics(engine: Any, rows: Batch) -> dict[str, float]:
    """Each TSSA layer's membership entropy and mean gate over its heads, as `entropy/LAYER` and `gate/LAYER`.

    They are of this rank's first micro-batch of `rows`, and what they mean is in `tostlm.tssa.Statistics`. Every rank
    must call, for at ZeRO stage 3 a forward pass needs them all.
    """
    found: dict[str, Tensor] = {}

    def watch(layer: int, mixer: Mixer) -> Any:
        def note(mixer: Mixer, inputs: tuple[Any, ...], output: Any) -> None:
            found.update({f"{name}/{layer}": value for name, value in mixer.statistics(*inputs).items()})

        # Before DeepSpeed's own hook, which lets go of the layer's parameters at stage 3.
        return mixer.register_forward_hook(note, prepend=True)

    mixers = [(layer, block.mixer) for layer, block in enumerate(engine.module.blocks)]
    hooks = [watch(layer, mixer) for layer, mixer in mixers if type(mixer).statistics is not Mixer.statistics]
    if not hooks:
        return {}
    micro = rows.split(engine.gradient_accumulation_steps())[0]
    engine.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled code does not see hooks
            micro._replace(targets=micro.targets[:, -1:]).loss(engine)  # as little of the loss as can be
    finally:
        engine.train()
        for hook in hooks:
            hook.remove()
    return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))
