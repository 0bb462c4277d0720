"""The memory of what followed what against its equations, at its start, and in bf16."""

from functools import partial

import pytest
import torch
from torch import Tensor

from tests.model.common import double
from tests.model.mixers.common import assert_equals_slow_form, draw, state_dtypes_under_bf16
from tostlm.model import ModelConfig, create_lm, state_bytes
from tostlm.model.mixers.induction import Induction, InductionOptions


def by_token(mixer: Induction, x: Tensor, starts: Tensor) -> Tensor:
    halflife = mixer.options.halflife_tokens
    a = 1.0 if halflife is None else 0.5 ** (1 / halflife)
    rows = []
    for sequence, begins in zip(x, starts, strict=True):
        ys: list[Tensor] = []
        for token, begin in zip(sequence, begins, strict=True):
            if begin or not ys:
                S, k = x.new_zeros(mixer.D, x.shape[-1]), x.new_zeros(mixer.D)
            w = (mixer.features_proj.weight @ token).clamp_min(0) ** 2
            b = torch.sigmoid(mixer.write_proj.weight @ token + mixer.write_proj.bias)
            S = a * S + b * torch.outer(k, mixer.values_proj.weight @ token - a * S.T @ k)
            gate = 2 / (1 + torch.exp(-mixer.gate_proj.weight @ token))
            k = w / w.norm().clamp_min(1e-6)
            ys.append(mixer.out_proj.weight @ (gate * (S.T @ k)))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        InductionOptions(),
        InductionOptions(key_channels=24, halflife_tokens=None),
        InductionOptions(key_channels=7, halflife_tokens=5.0),
        InductionOptions(key_channels=40),
    ],
    ids=["defaults", "never forgets", "few keys", "many keys"],
)
def test_equals_its_equations(options: InductionOptions) -> None:
    mixer = double(ModelConfig(1, 24, 3, 40, positions=None, layers=(options,))).blocks[0].mixer
    assert isinstance(mixer, Induction)
    assert_equals_slow_form(mixer, partial(by_token, mixer), 150, ([5, 6, 80], [130]))


def test_starts_as_a_copy_of_what_followed() -> None:
    """Untrained, what it reads after a token that it has seen is most like the token that came next there."""
    config = ModelConfig(1, 64, 4, 40, positions=None, layers=(InductionOptions(),), output_init="normal")
    mixer = create_lm(config, 0).blocks[0].mixer
    x, _, positions = draw(12, 64, ([],))
    x = torch.cat([x, x[:, 3:4]], 1).float()  # token 3 once more; token 4 followed it
    y, _ = mixer(x, positions._replace(positions=torch.arange(13)[None]), None)
    likeness = torch.nn.functional.cosine_similarity(y[:, -1:], x, -1)[0]
    assert likeness.argmax() == 4


@pytest.mark.parametrize(("key", "value"), [("key_channels", 0), ("halflife_tokens", -1.0), ("halflife_tokens", 1e-40)])
def test_impossible_options(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key} {value}"):
        InductionOptions(**{key: value})


def test_what_it_remembers() -> None:
    config = ModelConfig(2, 24, 3, 40, positions=None, layers=(InductionOptions(key_channels=7),))
    assert state_bytes(config, 1000) == 2 * 4 * (7 * 24 + 7)
    assert state_dtypes_under_bf16(InductionOptions(), [70, 1, 29]) == {torch.float32}
