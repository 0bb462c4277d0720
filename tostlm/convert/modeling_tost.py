"""The exported model: tostlm's LM behind the interface of transformers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tostlm.convert.configuration_tost import TostConfig
from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM, LMState
from tostlm.model.mixers.base import options_from_dict

UNPADDED = "run sequences of one length together, others one by one"


class TostForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc, unused-ignore]  # they have no types
    """A causal LM for `AutoModelForCausalLM`, whose `past_key_values` is the LM's state, of constant size for ToST.

    Batches may be padded on the right for scoring, where padding changes nothing before it. Left-padded batches, and
    generation from padded batches, are refused, because the state would take padding for text.
    """

    config_class = TostConfig
    base_model_prefix = "lm"
    accepts_loss_kwargs = False  # the loss is a mean; a Trainer must divide it by its accumulation steps
    _is_stateful = True  # a state cannot be rolled back, as assisted generation would ask

    def __init__(self, config: TostConfig) -> None:
        super().__init__(config)
        shape = {field.name: getattr(config, field.name) for field in fields(ModelConfig)}
        self.lm = LM(ModelConfig(**shape | {"layers": tuple(map(options_from_dict, config.layers))}))
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _init_weights(self, module: nn.Module) -> None:
        """Leave the weights alone: they come from a checkpoint."""

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.lm.embed = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: LMState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V], or of the last `logits_to_keep` tokens, and with labels the loss, shifted here."""
        if attention_mask is not None and (attention_mask[:, 0] == 0).any():
            raise ValueError(f"left-padded batches are not supported; {UNPADDED}")
        x, state = self.lm.hidden(input_ids, past_key_values)
        logits = self.lm.logits(x[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=None if use_cache is False else state)
        return output if return_dict is not False else output.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, past_key_values: LMState | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the inputs of the next step: the tokens that the state has not read yet."""
        mask = kwargs.get("attention_mask")
        if mask is not None and (mask == 0).any():
            raise ValueError(f"generation from padded batches is not supported; {UNPADDED}")
        read = past_key_values.tokens if past_key_values is not None else 0
        return {
            "input_ids": input_ids[:, read:],
            "past_key_values": past_key_values,
            "use_cache": kwargs.get("use_cache"),
            "logits_to_keep": 1,
        }

    def _reorder_cache(self, past_key_values: LMState, beam_idx: Tensor) -> LMState:
        return past_key_values.select(beam_idx.to(self.lm.embed.weight.device))
