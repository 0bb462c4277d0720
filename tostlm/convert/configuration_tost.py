"""The exported model's configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from tostlm.model.config import ModelConfig


class TostConfig(PretrainedConfig):
    """A transformers configuration whose own keys are those of `ModelConfig`."""

    model_type = "tost"
    # The names transformers and its tools read a model's size by.
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
    }

    def __init__(self, **kwargs: Any) -> None:
        for field in fields(ModelConfig):
            if field.name in kwargs:
                setattr(self, field.name, kwargs.pop(field.name))
        super().__init__(**kwargs)
        self.tie_word_embeddings = False  # one parameter serves both ends: there are no two to tie

    def model(self) -> ModelConfig:
        """The model's shape."""
        shape = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        pair = shape["halflife_tokens"]
        return ModelConfig(
            **{
                **shape,
                "mixers": tuple(shape["mixers"]),
                "halflife_tokens": None if pair is None else tuple(pair),
            }
        )
