"""A training pass reads none of its results: on a GPU its work is queued without a stop.

Fake tensors have no data, so what reads some is an error here.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tostlm.model import LM, MIXERS, ModelConfig

SWITCHES: dict[str, Any] = {
    "norm": "rmsnorm",
    "mlp": "swiglu",
    "embed_norm": True,
    "logit_softcap": 30.0,
    "z_loss": 1e-4,
}


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_a_pass_reads_none_of_its_results(mixer: str) -> None:
    with FakeTensorMode():
        lm = LM(replace(ModelConfig(2, 64, 2, 128, None, (MIXERS[mixer].options_class(),)), **SWITCHES))
        tokens = torch.zeros(2, 256, dtype=torch.int64)
        # Attention finds the documents' lengths, of which there is one number for each, on the host.
        starts = None if MIXERS[mixer].needs_spans else torch.zeros(2, 256, dtype=torch.bool)
        loss, _ = lm(tokens, targets=tokens, document_start_mask=starts)
        loss.backward()
        assert all(parameter.grad is not None for parameter in lm.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()
