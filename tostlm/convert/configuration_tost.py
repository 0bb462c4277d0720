"""The exported model's configuration."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class TostConfig(PretrainedConfig):  # type: ignore[misc, unused-ignore]  # it has no types
    """A transformers configuration whose own keys are those of `ModelConfig`, mixer options as dictionaries."""

    model_type = "tost"
    # The names by which transformers and its tools read a model's size.
    attribute_map = {  # noqa: RUF012
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "max_position_embeddings": "positions",
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tie_word_embeddings = False  # one parameter serves both ends: there are no two to tie
