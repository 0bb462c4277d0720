"""What several tests of training runs share."""

import time
from pathlib import Path

from tests.conftest import Run
from tostlm.checkpoint import checkpoints

REPORTED = (("train", "loss"), ("train", "grad_norm"), ("validation", "loss"))

CARRY = ["data.stateful=true", "data.reset_at_documents=true", "model.layers=[{mixer: tssa}]", "model.layer_scale=20.0"]
VARIANTS = {  # of a run, beside fp32 weights of one mixer
    "bf16": ["deepspeed.bf16.enabled=true"],
    "autocast": ["deepspeed.torch_autocast.enabled=true", "deepspeed.torch_autocast.dtype=bfloat16"],
    "offload": ["deepspeed.zero_optimization.offload_optimizer.device=cpu"],
    "carried": CARRY,
    "hybrid": ["model.layers=[{mixer: tssa}, {mixer: softmax}]", "model.positions=64"],
    "cross": ["model.layers=[{mixer: tssa_cross}]", "model.norm=rmsnorm", "model.layer_scale=null"],
}


def zero_options(stage: int, bf16: str = "false") -> list[str]:
    """Return the config overrides for a ZeRO stage, in fp32 or with bf16 weights."""
    keys = [f"deepspeed.zero_optimization.stage={stage}", f"deepspeed.bf16.enabled={bf16}"]
    # Parameters this small would otherwise stay whole at stage 3.
    return [*keys, "deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else keys


def wait_for_a_checkpoint(run: Run) -> None:
    deadline = time.monotonic() + 120
    while not checkpoints(run.dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert checkpoints(run.dir)


def blend(*sets: tuple[Path, float]) -> list[str]:
    listed = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in sets)
    return ["data.path=null", f"data.blend=[{listed}]"]
