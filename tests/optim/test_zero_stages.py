"""Muon under DeepSpeed's ZeRO stages against its equations in float64.

The equations get the gradients that the optimizer got: Newton-Schulz makes some 500 times as much of the smallest
differences in a gradient, such as fp32 leaves, and no two trainings stay together for long.
"""

import math
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.conftest import Run
from tests.processes import on_ranks
from tostlm.checkpoint.deepspeed_state import fragment_of, full_shape, gather_state
from tostlm.config import RunConfig
from tostlm.launch import RankInfo
from tostlm.model import create_lm
from tostlm.train.batches import Batch, RecurrentState, open_data
from tostlm.train.engine import TrainingEngine, start_engine, train_step

CLIP = 0.1  # of the gradient's norm, which is larger
OPTIMIZER = [
    "train.micro_batch_tokens=64",
    "optimizer.name=muon",
    "optimizer.muon.newton_schulz_dtype=fp32",
    f"deepspeed.gradient_clipping={CLIP}",
]
BF16 = "deepspeed.bf16.enabled=true"
ARMS = {  # overrides of the config
    "softmax": ["model.layers=[{mixer: softmax}, {mixer: tssa_delta}]", "model.positions=null"],
    "cautious, spectral, swiglu": [
        "model.layers=[{mixer: tssa_delta}, {mixer: induction, key_channels: 12}]",
        "model.positions=null",
        "model.mlp=swiglu",
        "optimizer.muon.update_scale=spectral",
        "optimizer.muon.cautious_weight_decay=true",
        'optimizer.groups=[{match: embed, lr_scale: 0.1}, {match: "mlp|norm", weight_decay: 0.3, lr_scale: 2}]',
    ],
    "heads, normuon": [
        "model.layers=[{mixer: softmax}, {mixer: rwkv7}]",
        "model.positions=null",
        "optimizer.muon.split_heads=true",
        "optimizer.muon.normuon_beta2=0.9",
    ],
    "bf16": ["model.layers=[{mixer: softmax}, {mixer: tssa_delta}]", "model.positions=null", BF16],
    "adamw, groups": [
        "model.layers=[{mixer: tssa}]",
        "optimizer.name=adamw",
        "optimizer.muon.newton_schulz_dtype=bf16",
        'optimizer.groups=[{match: embed, lr_scale: 0.1, weight_decay: 0}, {match: "0.*_proj", lr_scale: 0.5}]',
    ],
}


Pair = tuple[float, float]


def rate(step: int) -> float:
    return 5e-4 * min(1.0, (step + 1) / 5)


class Equations:
    """Muon and AdamW in float64, a parameter at a time."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.moments = config, dict[str, Any]()
        lm = create_lm(config.model, config.seed)
        lm = lm.bfloat16() if config.precision == "bf16" else lm  # of which DeepSpeed makes its fp32 weights
        self.weights = {n: p.detach() for n, p in lm.double().named_parameters()}
        self.exempt = {
            f"blocks.{layer}.mixer.{name}"
            for layer, block in enumerate(lm.blocks)
            for name in block.mixer.no_weight_decay
        }
        self.row_squares = dict[str, Tensor]()
        self.parts = {  # of matrices that are made of several
            **{name: 3 for name in self.weights if "memory.in_proj" in name},
            **{name: 2 for name in self.weights if "mlp.in_proj" in name and config.model.mlp == "swiglu"},
        }
        if config.model.layer_plan[0].mixer == "softmax":
            self.parts["blocks.0.mixer.in_proj.weight"] = 3
        if config.optimizer.muon.split_heads:
            heads = [f"blocks.1.mixer.{name}_proj.weight" for name in "rkv"]
            self.parts = {
                "blocks.0.mixer.in_proj.weight": 3 * config.model.heads,
                **dict.fromkeys(heads, config.model.heads),
            }

    def update(self, name: str, g: Tensor, step: int) -> None:
        lr, settings, w = rate(step), self.config.optimizer, self.weights[name]
        decay: Any = settings.weight_decay
        own = next((group for group in settings.groups if re.search(group.match, name)), None)
        if own is not None:
            lr, decay = lr * own.lr_scale, decay if own.weight_decay is None else own.weight_decay
        decay = 0.0 if w.dim() < 2 or name in self.exempt else decay
        is_matrix = re.search(r"(_proj|down|up)\.weight$", name) and min(w.shape) > self.config.model.heads
        if is_matrix and settings.name == "muon":
            beta = settings.muon.momentum
            m = self.moments[name] = beta * self.moments.get(name, 0.0) + (1 - beta) * g
            parts = ((1 - beta) * g + beta * m).chunk(self.parts.get(name, 1))
            change = torch.cat([orthogonal(part) for part in parts])
            if (beta2 := settings.muon.normuon_beta2) is not None:
                v = beta2 * self.row_squares.get(name, 0.0) + (1 - beta2) * change.square().mean(1, keepdim=True)
                self.row_squares[name] = v
                rows = zip(change.chunk(len(parts)), (change / (v.sqrt() + 1e-8)).chunk(len(parts)), strict=True)
                change = torch.cat([even * before.norm() / (even.norm() or 1.0) for before, even in rows])
            change = change * size(parts[0], settings.muon.update_scale)
            if settings.muon.cautious_weight_decay:
                decay = decay * (w * change > 0)
        else:
            beta1, beta2 = settings.betas
            m, v = self.moments.get(name, (torch.zeros_like(w), torch.zeros_like(w)))
            m, v = self.moments[name] = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            change = m / (1 - beta1 ** (step + 1)) / ((v / (1 - beta2 ** (step + 1))).sqrt() + settings.eps)
        self.weights[name] = w - lr * decay * w - lr * change


def size(x: Tensor, scale: str) -> float:
    rows, columns = x.shape
    return math.sqrt(max(1, rows / columns)) if scale == "spectral" else 0.2 * math.sqrt(max(rows, columns))


def orthogonal(x: Tensor) -> Tensor:
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x / (x.norm() or 1.0)
    for _ in range(5):
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


def clipped_gradients(config: RunConfig) -> dict[str, Tensor]:
    """Those of the first step, in float64, on one process."""
    lm = create_lm(config.model, config.seed).double()
    batch = Batch.from_numpy(open_data(config, 1).training.batch(0, 0, 1))
    loss, _ = lm(batch.inputs, targets=batch.targets, document_start_mask=batch.document_start_mask)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, parameters)
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
    assert norm > CLIP
    return {name: g * CLIP / norm for name, g in zip(names, grads, strict=True)}


class Recorder:
    """The gradients that the optimizer is given, whole, at any stage."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine, self.own, self.update = engine, dict[str, Tensor](), engine.guard._update
        self.shapes = {name: full_shape(parameter) for name, parameter in engine.module.named_parameters()}
        self.fragments = {name: fragment_of(engine, parameter) for name, parameter in engine.module.named_parameters()}
        engine.guard._update = self

    def __call__(self) -> None:
        for name, fragment in self.fragments.items():
            if fragment.owner.grad is not None:
                whole = self.own[name] = torch.zeros(self.shapes[name].numel())
                given = fragment.owner.grad.view(-1)[fragment.offset :][: len(fragment.elements)]
                whole[fragment.elements.start : fragment.elements.stop] = given
        self.update()

    def gradients(self) -> dict[str, Tensor]:
        for whole in self.own.values() if self.engine.zero_optimization() else ():
            dist.all_reduce(whole)
        return {name: self.own[name].view(shape).double() for name, shape in self.shapes.items()}


def errors(run: Run, configs: list[list[str]], steps: int, rank: int, world_size: int) -> list[dict[str, Pair]]:
    return [errors_of(run.config(*overrides), steps, RankInfo(rank, rank, world_size)) for overrides in configs]


def errors_of(config: RunConfig, steps: int, ranks: RankInfo) -> dict[str, Pair]:
    """Of each parameter the relative errors of the first gradient, and of the weights in the end."""
    data, equations, first = open_data(config, ranks.world_size), Equations(config), {}
    engine = start_engine(config, data.plan, ranks)
    state, recorder = RecurrentState(config, data.plan.accumulation, ranks), Recorder(engine)
    assert data.plan.accumulation > 1
    for step in range(steps):
        batch = Batch.from_numpy(data.training.batch(step, ranks.rank, ranks.world_size)).split(data.plan.accumulation)
        train_step(engine, batch, rate(step), lambda loss: False, False, state, lambda name: nullcontext())
        gradients = recorder.gradients()
        if not step:
            first = {name: relative(gradients[name], g) for name, g in clipped_gradients(config).items()}
        for name, gradient in gradients.items():
            equations.update(name, gradient, step)
    weights = gather_state(engine, dict.fromkeys(first, 0))
    engine.destroy()
    return {name: (first[name], relative(w, equations.weights[name])) for name, w in masters(weights).items()}


def masters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The fp32 weights; on rank 0 alone."""
    return {key.removesuffix("/weight"): tensor for key, tensor in state.items() if key.endswith("/weight")}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / (expected.norm() or 1.0))


SLOW = [
    pytest.param(arm, world_size, 50, marks=pytest.mark.slow, id=f"{arm}-{world_size} ranks")
    for arm in ARMS
    for world_size in (1, 2, 4)
]


@pytest.mark.parametrize(("arm", "world_size", "steps"), [("heads, normuon", 2, 8), ("bf16", 2, 8), *SLOW])
def test_every_stage_makes_the_same_updates(data: Path, tmp_path: Path, arm: str, world_size: int, steps: int) -> None:
    stages = range(4)
    configs = [[*OPTIMIZER, *ARMS[arm], f"deepspeed.zero_optimization.stage={stage}"] for stage in stages]
    found = on_ranks(world_size, partial(errors, Run(tmp_path, data), configs, steps), tmp_path / "ranks")[0]
    for stage, parameters in zip(stages, found, strict=True):
        for name, (gradient, weight) in parameters.items():
            assert gradient < (0.5 if BF16 in ARMS[arm] else 1e-4), (stage, name, gradient)
            assert weight < 1e-5, (stage, name, weight)
