"""What a run can say of its layers, every `train.statistics_every_steps`: activations, gradients, updates, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint.deepspeed_state import fragment_of, full_shape
from tostlm.model import layer_statistics
from tostlm.train.batches import Batch
from tostlm.train.engine import Timer, TrainingEngine, compute_loss, evaluating, gradients

GROWTH = 10.0  # of a parameter since the last look, beyond which it is named
NAMED = 8  # parameters that an event names


@torch.no_grad()
def forward_statistics(engine: TrainingEngine, batch: Batch, timer: Timer) -> dict[str, float]:
    """Return `layer_statistics` of a forward pass over a batch, of this rank's tokens.

    Every rank must call this, because a forward pass needs all ranks at ZeRO stage 3.
    """
    with timer("statistics"), layer_statistics(engine.module.blocks) as found:
        with evaluating(engine):
            compute_loss(engine, batch._replace(targets=batch.targets[:, -1:]))  # the loss itself is not needed
        return dict(zip(found, torch.stack(list(found.values())).tolist(), strict=True))


class Movement(NamedTuple):
    """What an update did to some parameters: Euclidean norms, over the elements of all ranks."""

    gradient: float  # after clipping
    change: float  # of the fp32 weights
    weight: float  # after the update
    elements: int

    @property
    def rms(self) -> float:
        """The root mean square of the weights."""
        return self.weight / math.sqrt(self.elements)


class UpdateProbe:
    """Measures an update of the optimizer, parameter by parameter, on the parts that this rank has of them.

    While an update is made, a copy of these parts takes 4 bytes an element.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        parameters = dict(engine.module.named_parameters())
        self._device, self._optimizer = engine.device, engine.basic_optimizer
        self._fragments = {name: fragment_of(engine, parameter) for name, parameter in parameters.items()}
        self._elements = {name: full_shape(parameter).numel() for name, parameter in parameters.items()}
        self._counts = dist.get_rank() == 0 or engine.zero_optimization()  # at stage 0 every rank has the whole
        self._updated = False  # an update has been measured, on all ranks
        self._squares: dict[str, Tensor] = {}  # of the gradient and the change, [2], where this rank had some
        self._rms: dict[str, float] = {}  # of the weights when they were last looked at

    def start(self) -> Callable[[], AbstractContextManager[None]]:
        """Return what is to be called around the next update, or around each of its parts."""
        self._updated, self._squares = False, {}
        return self._measuring

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        grads = gradients(self._optimizer)
        updated = {name: fragment for name, fragment in self._fragments.items() if fragment.owner in grads}
        before = {fragment.owner: fragment.owner.detach().clone() for fragment in updated.values()}
        squares = {name: self._square(name, grads[each.owner]) for name, each in updated.items()}
        yield
        self._updated = True
        for name, fragment in updated.items():
            change = self._square(name, fragment.owner.detach(), before[fragment.owner])
            self._squares[name] = torch.stack([squares[name], change])

    def _square(self, name: str, tensor: Tensor, origin: Tensor | None = None) -> Tensor:
        """Return the squared norm of a parameter's part of a tensor laid out as its owner, less that of `origin`."""
        fragment = self._fragments[name]
        if not self._counts:
            return torch.zeros((), dtype=torch.float64, device=self._device)
        own = slice(fragment.offset, fragment.offset + len(fragment.elements))
        part = tensor.reshape(-1)[own].float()
        part = part if origin is None else part - origin.reshape(-1)[own].float()
        norm: Tensor = torch.linalg.vector_norm(part)
        return norm.double().square().to(self._device)

    def movements(self) -> dict[str, Movement]:
        """Return what the measured update did to each parameter; {} if there was none. Every rank must call this."""
        if not self._updated:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=self._device)
        rows = [
            torch.cat([self._squares.get(name, nothing), self._square(name, fragment.owner.detach())[None]])
            for name, fragment in self._fragments.items()
        ]
        self._updated = False
        squares = torch.stack(rows)  # [parameters, 3]
        dist.all_reduce(squares)
        norms = zip(self._elements.items(), squares.sqrt().tolist(), strict=True)
        return {name: Movement(own[0], own[1], own[2], elements) for (name, elements), own in norms}

    def suspects(self, movements: Mapping[str, Movement]) -> dict[str, str]:
        """Return the names of parameters that have no gradient, and of those that have grown too much.

        The latter are not finite, or of a root mean square above one and `GROWTH` times that of the last call.
        """
        still = [name for name, each in movements.items() if not each.gradient]
        grown = []
        for name, each in movements.items():
            if not each.rms <= max(1.0, GROWTH * self._rms.get(name, math.inf)):
                grown.append(name)
            self._rms[name] = each.rms
        return {key: _some(names) for key, names in (("no_gradient", still), ("grown", grown)) if names}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def by_layer(movements: Mapping[str, Movement]) -> dict[str, float]:
    """Return the numbers of the layers, and of the parts beside them, from those of their parameters.

    They are gradient_norm/0, update_ratio/0, the norm of the change over that of the weights, and weight_rms/0; the
    embedding's are gradient_norm/embed and so on.
    """
    parts: dict[str, list[Movement]] = {}
    for name, each in movements.items():
        first, rest = name.split(".", 1)
        parts.setdefault(rest.split(".", 1)[0] if first == "blocks" else first, []).append(each)
    numbers = {}
    for part, own in parts.items():
        gradient, change, weight = (math.hypot(*norms) for norms in list(zip(*own, strict=True))[:3])
        whole = Movement(gradient, change, weight, sum(each.elements for each in own))
        numbers[f"gradient_norm/{part}"] = gradient
        numbers[f"update_ratio/{part}"] = change / weight if weight else math.nan
        numbers[f"weight_rms/{part}"] = whole.rms
    return numbers
