"""The block's switches: what each computes, what it costs, and where it starts."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.model.common import SHAPES, double, tokens_of
from tostlm.model import count_parameters, create_lm, training_flops_per_token
from tostlm.model.positions import SequencePositions

CONFIG = replace(SHAPES["tost"], width=48, layer_scale=None)
X = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_mlps_are_their_formulas() -> None:
    formulas: dict[str, Any] = {
        "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "relu2": lambda x: x.clamp_min(0) ** 2,
        "swiglu": lambda x: x[..., :128] * torch.sigmoid(x[..., :128]) * x[..., 128:],
    }
    for kind, formula in formulas.items():
        mlp = double(replace(CONFIG, mlp=kind)).blocks[0].mlp
        expected = formula(X @ mlp.in_proj.weight.t()) @ mlp.out_proj.weight.t()
        torch.testing.assert_close(mlp(X), expected)


def test_the_mlps_cost_the_same() -> None:
    sizes = {count_parameters(replace(CONFIG, mlp=kind)) for kind in ("gelu", "relu2", "swiglu")}
    assert len(sizes) == 1
    flops = {training_flops_per_token(replace(CONFIG, mlp=kind), 64) for kind in ("gelu", "relu2", "swiglu")}
    assert len(flops) == 1
    narrow = count_parameters(replace(CONFIG, mlp_width=100))
    assert sizes.pop() - narrow == CONFIG.depth * 2 * 48 * (4 * 48 - 100)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_the_norms_are_their_formulas(kind: str) -> None:
    norm = double(replace(CONFIG, norm=kind)).blocks[0].norm_mlp
    centred = X - X.mean(-1, keepdim=True) if kind == "layernorm" else X
    eps = 1e-5 if kind == "layernorm" else 1e-6
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight
    torch.testing.assert_close(norm(X), expected)


@pytest.mark.parametrize("layer_scale", [None, 0.5])
def test_a_block_whose_outputs_start_at_zero_is_the_identity(layer_scale: float | None) -> None:
    config = replace(CONFIG, output_init="zero", layer_scale=layer_scale, embed_norm=True, norm="rmsnorm")
    lm, tokens = create_lm(config, 0), tokens_of(config, 2, 30)
    assert lm.positions is not None
    x = lm.embed(tokens) + lm.positions.weight[:30]
    once = F.rms_norm(x, (48,), eps=1e-6)
    torch.testing.assert_close(lm(tokens)[0], F.rms_norm(once, (48,), eps=1e-6) @ lm.embed.weight.t())
    loss, _ = lm(tokens, targets=tokens_of(config, 2, 30, seed=1))
    loss.backward()
    for block in lm.blocks:  # and it learns from the first step on
        for branch in (block.mixer, block.mlp):
            assert branch.get_parameter("out_proj.weight").grad.norm() > 0


def test_without_a_gain_a_branch_counts_in_full() -> None:
    with_gain, without = create_lm(replace(CONFIG, layer_scale=1.0), 0), create_lm(CONFIG, 0)
    tokens = tokens_of(CONFIG, 2, 30)
    torch.testing.assert_close(with_gain(tokens)[0], without(tokens)[0])
    gains = {name for name, _ in with_gain.named_parameters()} - {name for name, _ in without.named_parameters()}
    assert gains == {f"blocks.{n}.scale_{branch}" for n in (0, 1) for branch in ("mixer", "mlp")}


def test_later_blocks_mix_in_the_embedding_and_the_first_values() -> None:
    """The third block adds the first's values to its own; TSSA, between them, has none."""
    config = replace(SHAPES["hybrid"], embed_norm=True)
    lm: Any = double(config)
    plain: Any = double(replace(config, value_residual=False, embed_skip=False))
    plain.load_state_dict({name: p for name, p in lm.state_dict().items() if name in plain.state_dict()})
    tokens = tokens_of(config, 2, 30)
    x = bottom = lm.embed_norm(lm.embed(tokens) + lm.positions.weight[:30])
    first = F.linear(lm.blocks[0].norm_mixer(x), lm.blocks[0].mixer.in_proj.weight[48:])
    positions = SequencePositions.build(tokens, 0, None, None, True)
    for block, alone in zip(lm.blocks, plain.blocks, strict=True):
        if block.skip is not None:
            x = block.skip[0] * x + block.skip[1] * bottom
        normed = block.norm_mixer(x)
        y = alone.mixer(normed, positions, None)[0]
        if block.values_gain is not None:
            q, k, v = block.mixer.in_proj(normed).split(24, -1)
            heads = [z.unflatten(-1, (3, 8)).transpose(1, 2) for z in (q, k, v + block.values_gain * first)]
            read = F.scaled_dot_product_attention(*heads, is_causal=True)
            y = block.mixer.out_proj(read.transpose(1, 2).flatten(2))
        x = x + block.scale_mixer * y
        x = x + block.scale_mlp * block.mlp(block.norm_mlp(x))
    torch.testing.assert_close(lm(tokens)[0], lm.norm(x) @ lm.embed.weight.t())
    assert [block.skip is None for block in lm.blocks] == [True, False, False]
    assert [block.values_gain is None for block in lm.blocks] == [True, True, False]
