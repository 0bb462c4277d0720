"""The authors' start and their decay groups, which a port must not change in silence."""

import math

import pytest
import torch

from tests.model.common import SOFTMAX, TSSA
from tostlm.model import GroupRule, ModelConfig, create_lm, parameter_groups
from tostlm.model.mixers.tssa import TSSAOptions

CONFIG = ModelConfig(depth=8, width=128, heads=4, vocab_size=2000, positions=256, layers=TSSA + SOFTMAX)


def test_one_seed_is_one_model() -> None:
    a, b, other = create_lm(CONFIG, 1), create_lm(CONFIG, 1), create_lm(CONFIG, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embed.weight, other.embed.weight)


def test_parts_that_are_taken_away_at_once_are_the_same() -> None:
    taken: list[torch.Tensor] = []

    def partition(part: torch.nn.Module) -> None:
        taken.extend(p.detach().clone() for p in part.parameters())
        part.to_empty(device="meta")

    lm, whole = create_lm(CONFIG, 1, partition), create_lm(CONFIG, 1)
    assert all(p.is_meta for p in lm.parameters())
    assert all(torch.equal(x, y) for x, y in zip(taken, whole.parameters(), strict=True))
    groups = (parameter_groups(model, weight_decay=0.1) for model in (lm, whole))
    assert [len(group["params"]) for group in next(groups)] == [len(group["params"]) for group in next(groups)]


def test_starting_values() -> None:
    for name, parameter in create_lm(CONFIG, 0).requires_grad_(False).named_parameters():
        if name.endswith("out_proj.weight"):
            assert float(parameter.std()) == pytest.approx(0.02 / math.sqrt(2 * 8), rel=0.05)
        elif "scale_" in name:
            assert (parameter == 1e-5).all()
        elif name.endswith("mixer.bias"):
            assert (parameter == 0).all()
        elif name.endswith("temp") or "norm" in name:
            assert (parameter == 1).all()
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.05), name
            assert abs(parameter.mean()) < 1e-3


def test_what_decays() -> None:
    lm = create_lm(CONFIG, 0)
    names = {parameter: name for name, parameter in lm.named_parameters()}
    decayed, kept = parameter_groups(lm, weight_decay=0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    kept_kinds = {names[p].removesuffix(".weight").rsplit(".", 1)[-1] for p in kept["params"]}
    assert kept_kinds == {"norm", "norm_mixer", "norm_mlp", "scale_mixer", "scale_mlp", "temp", "bias"}
    decayed_kinds = {names[p].removesuffix(".weight").rsplit(".", 1)[-1] for p in decayed["params"]}
    assert decayed_kinds == {"embed", "positions", "in_proj", "out_proj"}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_groups_of_chosen_parameters() -> None:
    """The first rule that matches counts; what does not decay never does."""
    lm = create_lm(CONFIG, 0)
    names = {parameter: name for name, parameter in lm.named_parameters()}
    rules = [GroupRule("embed", 0.1, 0.0), GroupRule(r"blocks\.[01]\.|embed", 2.0, None), GroupRule("temp$", 0.0, 0.3)]
    groups = {group["name"]: group for group in parameter_groups(lm, 0.1, ["blocks.0.mlp.in_proj.weight"], rules)}
    settings = {name: (group["kind"], group["lr_scale"], group["weight_decay"]) for name, group in groups.items()}
    assert settings == {
        "groups.0/decay": ("decay", 0.1, 0.0),
        "groups.1/decay": ("decay", 2.0, 0.1),
        "groups.1/no_decay": ("no_decay", 2.0, 0.0),
        "groups.1/matrices": ("matrices", 2.0, 0.1),
        "groups.2/no_decay": ("no_decay", 0.0, 0.0),
        "decay": ("decay", 1.0, 0.1),
        "no_decay": ("no_decay", 1.0, 0.0),
    }
    assert [names[p] for p in groups["groups.0/decay"]["params"]] == ["embed.weight"]
    assert [names[p] for p in groups["groups.1/matrices"]["params"]] == ["blocks.0.mlp.in_proj.weight"]
    assert all(names[p].startswith("blocks") for p in groups["groups.1/no_decay"]["params"])
    assert all(names[p].endswith("temp") for p in groups["groups.2/no_decay"]["params"])
    assert sum(len(group["params"]) for group in groups.values()) == len(names)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 100, "heads": 3}, "width 100 does not divide into 3 heads"),
        ({"depth": 0}, "depth 0 must be from 1"),
        ({"layers": ()}, "layers is empty"),
    ],
)
def test_impossible_shapes(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**{"depth": 2, "layers": TSSA, "width": 8, "heads": 2, "vocab_size": 9, "positions": 4, **change})


def test_impossible_half_lives() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        TSSAOptions(forgetting="ladder", halflife_tokens=(0.0, 5.0))
