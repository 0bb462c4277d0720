"""The interface of a token mixer, and the registry that a layer plan names them by.

A mixer is one module in this folder: a frozen dataclass of options, a NamedTuple state and a `Mixer` subclass. LM,
FLOPs, initialization, context parallelism, streaming state, statistics and export ask the mixer; nothing else in the
project tests a mixer's name. docs/extending.md builds one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tostlm.model.config import MixerOptions, ModelConfig
from tostlm.model.positions import SequencePositions
from tostlm.shapes import Float

MIXERS: dict[str, type[Mixer]] = {}  # by the name that a layer plan uses

MixerState = Any  # a NamedTuple of tensors [B, ...]: what a mixer remembers of each sequence


class Mixer(nn.Module):
    """A causal token mixer.

    Attributes:
        options_class: its frozen dataclass of options. The default of the field `mixer` is the mixer's registered name.
        state_class: the NamedTuple type of its state. The first dimension of every field is the batch, along which
            states are selected, joined and split.
        constant_state: whether the state has the same size after any number of tokens.
        context_parallel: how ranks share a context. "sequence": each rank mixes its own tokens and every rank returns
            the state after the last rank's. "heads": each rank mixes all tokens of its share of the heads, and keeps
            the state of those. None: they cannot.
        has_values: whether `model.value_residual` reaches it: it then has a method `values`, and `forward` takes
            `added_values` [B, T, C] as its fourth argument, which it adds to those.
        has_biases: whether its projections in and out have biases with `model.bias`, which it needs to be used with.
        layer_scale: what LayerScale of its branch starts at where the model has LayerScale; None is the config's.
        needs_spans: whether `SequencePositions.spans` and `step_mask` are to be built.
        no_weight_decay: names of its own matrices that the optimizer must not decay.
    """

    options_class: ClassVar[type[MixerOptions]]
    state_class: ClassVar[type[Any]]
    constant_state: ClassVar[bool]
    context_parallel: ClassVar[Literal["sequence", "heads"] | None] = None
    has_values: ClassVar[bool] = False
    has_biases: ClassVar[bool] = False
    layer_scale: ClassVar[float | None] = None
    needs_spans: ClassVar[bool] = False
    no_weight_decay: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "options_class" not in cls.__dict__:
            return  # a base of mixers
        name = cls.options_class.mixer
        taken = MIXERS.get(name)
        if not name or (taken is not None and (taken.__module__, taken.__name__) != (cls.__module__, cls.__name__)):
            raise TypeError(f"the options of {cls.__name__} must name a mixer of their own; {name!r} is taken or empty")
        MIXERS[name] = cls

    def __init__(self, config: ModelConfig, options: Any) -> None:
        """Build the mixer of one block, its parameters uninitialized; `options` is an instance of `options_class`."""
        super().__init__()
        self.config, self.options = config, options

    @abstractmethod
    def forward(
        self, x: Float[Tensor, "B T C"], positions: SequencePositions, state: MixerState | None
    ) -> tuple[Float[Tensor, "B T C"], MixerState]:
        """Mix tokens causally.

        Args:
            x: [B, T, C], the normalized residual stream.
            positions: where the tokens are in their context and documents. Nothing before a document's first token
                (`positions.document_start_mask`) may have any influence on it.
            state: the state after the tokens before these; None at the start of a context.

        Returns:
            [B, T, C], and the state after these tokens. Consecutive calls, each with the state of the one before,
            equal one call on all tokens.
        """

    def values(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Return the values of tokens x, before any convolution, of a mixer with `has_values`."""
        raise NotImplementedError

    @abstractmethod
    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialize the parameters in place, drawing from `generator` alone."""

    @abstractmethod
    def flops_per_token(self, context: int) -> float:
        """Return the floating-point operations of the forward pass per token, on average over `context` tokens."""

    @abstractmethod
    def state_bytes(self, context: int) -> int:
        """Return the bytes of one sequence's state after `context` tokens."""

    def statistics(self, x: Tensor, positions: SequencePositions, state: MixerState | None) -> dict[str, Tensor]:
        """Return scalars that describe a forward pass over some tokens, by name. By default none."""
        return {}


def options_from_dict(entry: Mapping[str, Any]) -> MixerOptions:
    """Build mixer options from an entry of a layer plan as JSON has it, such as {"mixer": "tssa"}."""
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return MIXERS[entry["mixer"]].options_class(**values)
