"""Recipes: names for the switches of a model's block that go together, each of which a config may still set."""

from __future__ import annotations

from typing import Any

from tostlm.errors import UserError

# Without LayerScale and with outputs that start at zero, models of this recipe learn more slowly (docs/models.md).
MODERN: dict[str, Any] = {"norm": "rmsnorm", "embed_norm": True, "mlp": "relu2"}
MODERN_LAYERS: dict[str, dict[str, Any]] = {
    "softmax": {"qk_norm": True, "rotary_base": 10_000.0},
    "window": {"qk_norm": True},
}

RECIPES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "paper": ({}, {}),
    "modern": (MODERN, MODERN_LAYERS),
}


def expand_recipe(model: Any, config: str) -> Any:
    """Replace the key `recipe` of the model section of a config by the keys it stands for, where it does not set them.

    Raises:
        UserError: there is no such recipe.
    """
    if not isinstance(model, dict) or "recipe" not in model:
        return model
    name = model["recipe"]
    if name not in RECIPES:
        raise UserError(f"{config}: model.recipe {name!r} is not known; use {' or '.join(RECIPES)}")
    switches, by_mixer = RECIPES[name]
    expanded = switches | {key: value for key, value in model.items() if key != "recipe"}
    if isinstance(layers := model.get("layers"), list):
        expanded["layers"] = [
            by_mixer.get(str(entry.get("mixer")), {}) | entry if isinstance(entry, dict) else entry for entry in layers
        ]
    return expanded
