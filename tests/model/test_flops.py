"""The operations that are reckoned with are those of the matrix products that torch is asked for."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tostlm.config import load_config
from tostlm.model import LM, training_flops_per_token

TOKENS = 1024


def chain_flops(own: Any, reads: Any, *others: Any, out_shape: Any = None, **options: Any) -> int:
    """Of a chain: two products of its states for every step."""
    B, N, H, L, V = own
    return 2 * 2 * B * N * H * L * V * int(reads[-1])


@pytest.mark.parametrize(
    "name", [f"{kind}-{size}" for kind in ("tost", "gpt2", "tost-long", "tost-hybrid") for size in ("base", "large")]
)
def test_operations_of_a_shipped_config_are_those_that_torch_counts(name: str) -> None:
    config = load_config(Path(name)).model
    config = replace(config, depth=len(config.layers))
    with FakeTensorMode():
        lm = LM(config)
        own = {torch.ops.tostlm_chain_operator.delta_chain: chain_flops}
        counter = FlopCounterMode(display=False, custom_mapping=own)
        with counter:
            lm(torch.zeros(1, TOKENS, dtype=torch.int64))
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if "attention" in str(op))
    counted = (sum(counts.values()) - attention / 2) / TOKENS  # torch takes causal attention for whole
    assert 3 * counted == pytest.approx(training_flops_per_token(config, TOKENS), rel=0.02)
