"""The exported model: tostlm's LM behind the interface of transformers.

Shapes: B sequences, T tokens, C channels, V rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tostlm.convert.cache_tost import Padding, TostCache
from tostlm.convert.configuration_tost import TostConfig
from tostlm.model.config import ModelConfig
from tostlm.model.lm import LM
from tostlm.model.loss import IGNORE
from tostlm.model.mixers.base import options_from_dict


class TostForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc, unused-ignore]  # they have no types
    """A causal LM for `AutoModelForCausalLM`, whose `past_key_values` is the LM's state, of constant size for ToST.

    Batches may be padded on either side, for scoring and for generation: a row computes what it would alone.
    """

    config_class = TostConfig
    base_model_prefix = "lm"
    accepts_loss_kwargs = False  # the loss is a mean; a Trainer must divide it by its accumulation steps
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  # whose parts a device map keeps on one device
    _is_stateful = True  # a state cannot be rolled back, as assisted generation would ask

    def __init__(self, config: TostConfig) -> None:
        super().__init__(config)
        named = [field.name for field in fields(ModelConfig) if hasattr(config, field.name)]  # others are at defaults
        shape = {name: getattr(config, name) for name in named}
        self.lm = LM(ModelConfig(**shape | {"layers": tuple(map(options_from_dict, config.layers))}))
        self.gradient_checkpointing = False
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialize the parts of the model that nothing has been loaded into, as training does, by torch's seed."""
        for part in self.lm.parts():
            parameters = list(part.parameters())
            loaded = any(getattr(parameter, "_is_hf_initialized", False) for parameter in parameters)
            if not loaded and not any(parameter.is_meta for parameter in parameters):  # such as are on the disk
                seed = int(torch.randint(1 << 62, ()))
                self.lm.reset_part(part, torch.Generator(parameters[0].device).manual_seed(seed))

    def _set_gradient_checkpointing(self, enable: bool = True, every_n_layers: int = 1, **options: Any) -> None:
        if options.get("offload"):
            raise ValueError("activations cannot be offloaded; leave offload out")
        self.gradient_checkpointing = enable
        self.lm.activation_checkpointing_every = every_n_layers if enable else None

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.lm.embed = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TostCache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Return logits [B, T, V], or of the last `logits_to_keep` tokens or those places, and with labels the loss.

        Args:
            attention_mask: [B, T], or with the tokens before these, 0 for padding.
            inputs_embeds: [B, T, C], what is read in place of tokens.
            position_ids: those that follow from the mask; no others can be asked for.
            labels: [B, T], shifted here; no token is predicted from padding.

        Raises:
            ValueError: what is read follows other tokens and is padded, or is not one of the above.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds")
        given = input_ids if inputs_embeds is None else inputs_embeds
        assert given is not None
        T, past = given.shape[1], past_key_values.state if past_key_values is not None else None
        mask = None if attention_mask is None else attention_mask[:, -T:]
        padding = None if mask is None else Padding.of(mask)
        if padding is not None and past is not None:
            raise ValueError("padding can stand before and after a context, not after tokens that were read already")
        self._check_positions(position_ids, attention_mask, past_key_values, given)
        tokens = given.new_zeros(given.shape[:2], dtype=torch.int64) if input_ids is None else input_ids
        starts = None
        if padding is not None:
            tokens, starts = tokens.gather(1, padding.order), padding.starts
            if inputs_embeds is not None:
                inputs_embeds = _rows(inputs_embeds, padding.order)
        asked = output_hidden_states or self.config.output_hidden_states
        watched: AbstractContextManager[list[Tensor]] = _block_outputs(self.lm) if asked else nullcontext([])
        with watched as layers:
            x, state = self.lm.hidden(tokens, past, starts, embeddings=inputs_embeds)
        hidden = [*layers[:-1], x] if asked else None
        if padding is not None:
            x = _rows(x, padding.places)
            hidden = None if hidden is None else [_rows(each, padding.places) for each in hidden]
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        # A device map may have the last block elsewhere than the embedding.
        logits = self.lm.logits(x[:, kept].to(self.lm.output_weight.device))
        output = CausalLMOutputWithPast(
            loss=None if labels is None else _loss(logits, labels, mask),
            logits=logits,
            past_key_values=None if use_cache is False else TostCache(state),
            hidden_states=None if hidden is None else tuple(hidden),
        )
        return output if return_dict is not False else output.to_tuple()

    def _check_positions(
        self, position_ids: Tensor | None, mask: Tensor | None, cache: TostCache | None, given: Tensor
    ) -> None:
        """Check that positions, if they are given, are those that the model reads tokens at."""
        if position_ids is None:
            return
        T, past = given.shape[1], cache.get_seq_length() if cache is not None else 0
        if mask is None or mask.shape[1] != past + T:
            expected, real = torch.arange(past, past + T, device=given.device)[None], None
        else:
            expected, real = (mask.cumsum(1) - 1)[:, -T:], mask[:, -T:] != 0
        same = position_ids == expected
        if not bool((same if real is None else same | ~real).all()):
            raise ValueError("position_ids are not those that follow from attention_mask, the only ones that are read")

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: TostCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the inputs of the next step: what the state has not read yet."""
        read = past_key_values.get_seq_length() if past_key_values is not None else 0
        inputs: dict[str, Any] = {"input_ids": input_ids[:, read:]}
        if inputs_embeds is not None:
            ahead = inputs_embeds.shape[1] - read
            inputs = {"inputs_embeds": inputs_embeds[:, read:]} if ahead > 0 else {"input_ids": input_ids[:, -1:]}
        keys = {"past_key_values": past_key_values, "attention_mask": attention_mask, "logits_to_keep": 1}
        return inputs | keys | {"use_cache": kwargs.get("use_cache")}


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """Return the vectors of x [B, T, C] at some places [B, T] of each row."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def _loss(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean loss of labels [B, T] by the logits [B, T, V] of the tokens before them, padding left out."""
    wanted = labels[:, 1:]
    if mask is not None:
        wanted = wanted.masked_fill((mask[:, 1:] == 0) | (mask[:, :-1] == 0), IGNORE)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORE)


@contextmanager
def _block_outputs(lm: LM) -> Iterator[list[Tensor]]:
    """Give a list that gets what a model's first block reads and what each block leaves, [B, T, C]."""
    found: list[Tensor] = []
    hooks = [lm.blocks[0].register_forward_pre_hook(lambda block, inputs: found.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda block, inputs, output: found.append(output[0])) for block in lm.blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
