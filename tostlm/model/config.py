"""The shape of a language model. Plain dataclasses, so that exported models need nothing but torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

MAX_SIZE = 2**31 - 1  # of any dimension


@dataclass(frozen=True)
class MixerOptions:
    """Options of a token mixer. Each mixer in `tostlm.model.mixers` subclasses this beside its module."""

    # pydantic reads this where a config file is validated: an unknown key is an error.
    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "allow_inf_nan": False}

    mixer: str = ""  # its name in a config; the subclass's default is the name it is registered under


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a causal LM: `depth` blocks of a token mixer and an MLP, tied embeddings. Its defaults are the paper's.

    Raises:
        ValueError: a size is out of range, the heads do not divide the width, or the layer plan is empty.
    """

    __pydantic_config__: ClassVar[dict[str, str | bool]] = {"extra": "forbid", "allow_inf_nan": False}
    init_std: ClassVar[float] = 0.02  # of normally distributed weights at initialization, as GPT-2

    depth: int  # blocks
    width: int  # channels C of the residual stream
    heads: int  # H of every mixer; they divide the width
    vocab_size: int  # rows V of the embedding, at least the tokenizer's vocabulary
    positions: int | None  # rows of the position table and of TSSA's bias, the longest context; None is unbounded
    layers: tuple[MixerOptions, ...]  # the layer plan: of each block's mixer, repeated until `depth` blocks have one
    layer_scale: float | None = 1e-5  # initial gain of every residual branch (LayerScale); None leaves the gain out
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # before every branch and at the end
    bias: bool = False  # biases of LayerNorms, of the MLP and of the mixers' projections in and out, as GPT-2 has
    embed_norm: bool = False  # also after the embedding
    # What is between the MLP's matrices; gelu_tanh is OpenAI's approximation of GELU, relu2 is ReLU squared.
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    mlp_width: int | None = None  # channels there; None is what makes the MLP 8 width^2 parameters
    # Where the projections into the residual stream start: normal, or zero, so that every block starts as the identity.
    output_init: Literal["normal", "zero"] = "normal"
    tie_embeddings: bool = True  # whether the output projection is the embedding; else it has its own matrix, from zero
    logit_softcap: float | None = None  # logits become softcap tanh(logits / softcap); None leaves them as they are
    z_loss: float = 0.0  # what the training loss counts the square of the log of softmax's denominator by
    value_residual: bool = False  # whether later layers add the first layer's values to theirs, by a learned gain each
    embed_skip: bool = False  # whether later blocks start from a learned mix of the residual stream and the embedding

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "vocab_size", "positions", "mlp_width"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SIZE:
                raise ValueError(f"{name} {value} must be from 1 to {MAX_SIZE}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap {self.logit_softcap} must be positive; null leaves the logits as they are")
        if self.z_loss < 0:
            raise ValueError(f"z_loss {self.z_loss} must be 0 or more")
        if self.bias and self.norm != "layernorm":
            raise ValueError(f"bias true goes with norm layernorm; {self.norm} has none")
        if not self.layers:
            raise ValueError("layers is empty; name at least one mixer, as in layers: [{mixer: tssa}]")

    @property
    def layer_plan(self) -> tuple[MixerOptions, ...]:
        """Mixer options of each of the `depth` blocks."""
        return tuple(self.layers[layer % len(self.layers)] for layer in range(self.depth))

    @property
    def mlp_channels(self) -> int:
        """Channels inside the MLP: with SwiGLU's third matrix two thirds of the four times the width of others."""
        return self.mlp_width or (4 * self.width if self.mlp != "swiglu" else round(8 * self.width / 3))

    @property
    def residual_init_std(self) -> float:
        """Standard deviation at initialization of projections into the residual stream, which every block has two of.

        Source: GPT-2's scaling by 1/sqrt(residual layers), as in nanoGPT and the authors' release; zero as in muP and
        the runs of modded-nanoGPT.
        """
        return 0.0 if self.output_init == "zero" else self.init_std / math.sqrt(2 * self.depth)
