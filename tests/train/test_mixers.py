"""Every mixer and switch of the block trains alike at any stage, on any ranks, and resumes."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Run, succeed
from tests.train.run_helpers import REPORTED, zero_options
from tostlm.checkpoint import checkpoints

CROSS = ["model.layers=[{mixer: tssa_cross}]"]
SOFTMAX = ["model.layers=[{mixer: softmax, rotary_base: 100, qk_norm: true, short_conv: 4, gate: output}]"]
BLOCK = ["model.norm=rmsnorm", "model.embed_norm=true", "model.mlp=swiglu", "model.mlp_width=48"]
BLOCK += ["model.layer_scale=null", "model.output_init=zero", "model.embed_skip=true", "model.z_loss=1e-4"]
BLOCK += ["model.tie_embeddings=false", "model.logit_softcap=20"]
VALUES = "model.value_residual=true"
TSSA = "{mixer: tssa, forgetting: selective, short_conv: 4, query: own, membership: scale_free, gate: output}"
MODELS = {
    "tssa": [f"model.layers=[{TSSA}]", *BLOCK, "data.stateful=true", "data.reset_at_documents=true"],
    "cross": [*CROSS, *BLOCK, VALUES, "data.reset_at_documents=true"],
    "delta": [
        "model.layers=[{mixer: gated_delta}, {mixer: induction, key_channels: 16}]",
        *BLOCK,
        "data.reset_at_documents=true",
    ],
    "memberships": [
        "model.layers=[{mixer: tssa_cross, write: membership}, {mixer: tssa_delta}]",
        *BLOCK,
        "data.reset_at_documents=true",
    ],
    "rwkv7": ["model.layers=[{mixer: rwkv7}]", *BLOCK, "data.reset_at_documents=true"],
    "softmax": [*SOFTMAX, *BLOCK, VALUES, "data.reset_at_documents=true"],
    "window": ["model.layers=[{mixer: window, window_tokens: 20}]", *BLOCK, "data.reset_at_documents=true"],
    "combiner": ["model.layers=[{mixer: combiner, block_tokens: 12}]", *BLOCK, "data.reset_at_documents=true"],
    "carried": [*CROSS, *BLOCK, "data.stateful=true", "data.reset_at_documents=true"],
}
PARALLEL = "train.context_parallel_size=2"


def metrics(run: Run) -> dict[tuple[str, str], dict[int, float]]:
    return {(kind, key): run.metrics(kind, key) for kind, key in REPORTED}


# Their states differ from the others' only in their fields.
SLOW = {"delta", "rwkv7", "memberships", "combiner", "window"}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in MODELS])
def model(request: pytest.FixtureRequest) -> list[str]:
    return MODELS[request.param]


def test_trains_alike_on_other_ranks_and_stages_and_resumes(data: Path, model: list[str], tmp_path: Path) -> None:
    runs = []
    for name in ("one", "split"):
        (tmp_path / name).mkdir()
        runs.append(Run(tmp_path / name, data))
    one, split = runs
    succeed(one.train(*model, *zero_options(0)))
    assert one.metrics("train")[6] < one.metrics("train")[1]
    shared = [] if "data.stateful=true" in model else [PARALLEL]
    succeed(split.train(*model, *zero_options(3), *shared, nproc=2))
    found = metrics(split)
    for name, values in metrics(one).items():
        assert found[name] == pytest.approx(values, rel=2e-3), name
    shutil.rmtree(checkpoints(split.dir)[-1])
    succeed(split.train(*model, *zero_options(1), nproc=2))
    assert metrics(split)["train", "loss"] == pytest.approx(found["train", "loss"], rel=2e-4)
