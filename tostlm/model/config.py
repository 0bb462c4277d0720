"""The shape of a language model. A plain dataclass, so that exported models need nothing but torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

LARGEST = 2**31 - 1  # of a dimension
MixerName = Literal["tssa", "softmax"]


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a causal LM: `layers` blocks of a token mixer and an MLP of four times the width, tied embeddings.

    Attributes:
        layers: number of blocks.
        width: channels of the residual stream.
        heads: heads of every mixer; they divide the width.
        vocab_size: rows of the embedding, at least the tokenizer's pieces.
        positions: length of the learned position table (and of TSSA's per-position membership bias), which is also
            the longest context; None has neither and bounds the context by nothing.
        mixers: token mixer of each layer, repeated over the layers: ["tssa"] is ToST, ["softmax"] is GPT-2,
            anything longer a hybrid.
        halflife_tokens: half-lives of TSSA's running sums, of the first head and of the last, geometric between;
            None never forgets, which is the paper's operator.
        layer_scale: initial gain of every residual branch (LayerScale).
    """

    # Unknown keys are errors where a config file is read; pydantic looks here for that.
    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "allow_inf_nan": False}

    layers: int
    width: int
    heads: int
    vocab_size: int
    positions: int | None
    mixers: tuple[MixerName, ...] = ("tssa",)
    halflife_tokens: tuple[float, float] | None = None
    layer_scale: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "vocab_size", "positions"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= LARGEST:
                raise ValueError(f"{name} {value} must be from 1 to {LARGEST}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if not self.mixers:
            raise ValueError("mixers is empty; name at least one, as in mixers: [tssa]")
        if self.halflife_tokens is not None and min(self.halflife_tokens) <= 0:
            raise ValueError(f"halflife_tokens {list(self.halflife_tokens)} must be positive")

    def mixer(self, layer: int) -> MixerName:
        """The token mixer of layer `layer`."""
        return self.mixers[layer % len(self.mixers)]
