"""A training pass reads none of its results: on a GPU its work is queued without a stop.

Fake tensors have no data, so what reads some is an error here.
"""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tostlm.model import LM, MIXERS, ModelConfig

PLAIN = ModelConfig(2, 64, 2, 128, None, (MIXERS["tssa"].options_class(),))
MODERN = replace(PLAIN, norm="rmsnorm", mlp="swiglu", embed_norm=True, logit_softcap=30.0, z_loss=1e-4, embed_skip=True)


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("shape", [PLAIN, MODERN], ids=["plain", "modern"])
def test_a_pass_reads_none_of_its_results(mixer: str, shape: ModelConfig) -> None:
    with FakeTensorMode():
        lm = LM(replace(shape, layers=(MIXERS[mixer].options_class(),)))
        tokens = torch.zeros(2, 256, dtype=torch.int64)
        # Attention finds the documents' lengths, of which there is one number for each, on the host.
        starts = None if MIXERS[mixer].needs_spans else torch.zeros(2, 256, dtype=torch.bool)
        loss, _ = lm(tokens, targets=tokens, document_start_mask=starts)
        loss.backward()
        assert all(parameter.grad is not None for parameter in lm.parameters())
        with pytest.raises(DataDependentOutputException):
            loss.item()
