"""What an update did to the parameters, the same at every ZeRO stage."""

import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run, succeed
from tests.processes import on_ranks
from tests.train.run_helpers import zero_options
from tostlm.checkpoint.deepspeed_state import gather_weights
from tostlm.launch import RankInfo
from tostlm.train.batches import Batch, RecurrentState, open_data
from tostlm.train.engine import start_engine, train_step
from tostlm.train.statistics import Movement, UpdateProbe, by_layer

CLIP = "deepspeed.gradient_clipping=0.1"  # below the norm of the gradient
VARIANTS = {
    **{f"stage {stage}": zero_options(stage) for stage in range(4)},
    "bf16": zero_options(2, "true"),
    "offload": [*zero_options(1), "deepspeed.zero_optimization.offload_optimizer.device=cpu"],
    "muon": [*zero_options(1), "optimizer.name=muon"],
}


FAST = ["stage 0", "stage 3", "muon"]
OTHERS = ["stage 0", *(name for name in VARIANTS if name not in FAST)]


def movements(run: Run, variants: list[str], rank: int, world_size: int) -> dict[str, tuple[Any, ...]]:
    """Of each variant what a second step did, as the probe has it and as the weights have it, and its clipped norm."""
    ranks, found = RankInfo(rank, rank, world_size), {}
    for name in variants:
        config = run.config(*VARIANTS[name], CLIP)
        data = open_data(config, world_size)
        engine = start_engine(config, data.plan, ranks)
        state, probe, weights = RecurrentState(config, data.plan.accumulation, ranks), UpdateProbe(engine), []
        for step in range(2):
            weights.append(gather_weights(engine))
            batch = Batch.from_numpy(data.training.batch(step, rank, world_size)).split(data.plan.accumulation)
            engine.guard.around_update = probe.start() if step else nullcontext
            norm = train_step(engine, batch, 1e-2, lambda _: False, False, state, lambda _: nullcontext()).grad_norm
        weights.append(gather_weights(engine))
        measured = probe.movements()
        assert probe.movements() == {}
        found[name] = measured, weights, norm
        engine.destroy()
    return found


@pytest.mark.parametrize("variants", [FAST, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["some", "others"])
def test_the_norms_of_an_update_at_every_stage(run: Run, tmp_path: Path, variants: list[str]) -> None:
    of_ranks = on_ranks(2, partial(movements, run, variants), tmp_path)
    for name, (measured, weights, norm) in of_ranks[0].items():
        assert measured == of_ranks[1][name][0]
        assert measured.keys() == weights[0].keys()
        tolerance = 0.05 if name == "bf16" else 1e-4
        for parameter, each in measured.items():
            after, before = weights[2][parameter].double(), weights[1][parameter].double()
            assert each.elements == after.numel()
            assert each.weight == pytest.approx(float(after.norm()), rel=tolerance)
            if name != "bf16":  # whose weights are rounded
                assert each.change == pytest.approx(float((after - before).norm()), rel=1e-3)
        clipped = math.hypot(*(each.gradient for each in measured.values()))
        assert norm > 0.1 and clipped == pytest.approx(0.1, rel=1e-2)
        if name not in ("bf16", "muon"):
            for parameter, each in measured.items():
                assert each.gradient == pytest.approx(of_ranks[0]["stage 0"][0][parameter].gradient, rel=1e-3)


def test_the_numbers_of_layers() -> None:
    numbers = by_layer(
        {
            "embed.weight": Movement(1.0, 2.0, 4.0, 16),
            "blocks.11.mixer.a": Movement(3.0, 0.3, 3.0, 5),
            "blocks.11.mlp.b": Movement(4.0, 0.4, 4.0, 20),
        }
    )
    assert numbers == pytest.approx(
        {
            "gradient_norm/embed": 1.0,
            "update_ratio/embed": 0.5,
            "weight_rms/embed": 1.0,
            "gradient_norm/11": 5.0,
            "update_ratio/11": 0.1,
            "weight_rms/11": 1.0,
        }
    )


def test_parameters_that_stand_still_or_grow_are_named(run: Run) -> None:
    """All but an output projection that starts at zero have no gradient in the first step."""
    keys = ["model.tie_embeddings=false", "train.statistics_every_steps=1", "train.steps=2"]
    said = succeed(run.train(*keys))
    assert said.count("no_gradient") == 1
    assert "step 1/2  parameters  no_gradient embed.weight, blocks.0." in said
    assert set(run.metrics("statistics", "update_ratio/head")) == {1, 2}
    assert run.metrics("statistics", "gradient_norm/0")[1] == 0 < run.metrics("statistics", "gradient_norm/0")[2]


def test_what_has_grown_too_much() -> None:
    probe = UpdateProbe.__new__(UpdateProbe)
    probe._rms = {}

    def named(**rms: float) -> dict[str, str]:
        return probe.suspects({name: Movement(1.0, 1.0, value, 1) for name, value in rms.items()})

    assert named(a=5.0, b=0.01, c=1.0) == {}
    assert named(a=51.0, b=0.9, c=9.9) == {"grown": "a"}
    assert named(a=52.0, b=10.0, c=math.nan) == {"grown": "b, c"}
    assert probe.suspects({f"w{i}": Movement(0.0, 0.0, 1.0, 1) for i in range(10)}) == {
        "no_gradient": "w0, w1, w2, w3, w4, w5, w6, w7 and 2 more"
    }
