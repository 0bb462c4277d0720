"""Truncated backpropagation: windows of one document after another, read as the document is."""

import shutil

import pytest
import torch

from tests.conftest import Run, succeed
from tests.train.run_helpers import CARRY
from tostlm.checkpoint import checkpoints
from tostlm.errors import UserError
from tostlm.model import create_lm
from tostlm.train.batches import Batch, open_data
from tostlm.train.engine import compute_loss


@torch.no_grad()
def test_the_losses_are_those_of_the_documents_read_whole(run: Run) -> None:
    still = ["optimizer.lr=1e-20", "optimizer.min_lr=0"]
    succeed(run.train(*CARRY, *still))
    config = run.config(*CARRY, *still)
    lm, loader = create_lm(config.model, config.seed), open_data(config, 1).training
    windows = [Batch.from_numpy(loader.batch(step, 0, 1)) for step in range(6)]
    logits, _ = lm(
        torch.cat([rows.inputs for rows in windows], 1),
        document_start_mask=torch.cat([rows.document_start_mask for rows in windows], 1),
    )
    targets = torch.cat([rows.targets for rows in windows], 1)
    losses = (
        torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").view(8, 6, 64).mean((0, 2))
    )
    assert list(run.metrics("train").values()) == pytest.approx(losses.tolist(), abs=1e-5)
    alone = [float(compute_loss(lm, rows)[0]) for rows in windows]
    assert alone[0] == pytest.approx(float(losses[0]), abs=1e-5)
    assert all(abs(a - float(b)) > 1e-4 for a, b in zip(alone[1:], losses[1:], strict=True))


def test_a_run_resumes_with_what_it_remembers_on_any_ranks(run: Run) -> None:
    succeed(run.train(*CARRY))
    losses = run.metrics("train")
    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*CARRY))
    assert run.metrics("train") == losses
    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*CARRY, "train.micro_batch_tokens=256", nproc=2))  # other parts of other ranks
    assert run.metrics("train") == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
def test_ranks_that_share_their_rows_remember_the_same(run: Run) -> None:
    succeed(run.train(*CARRY))
    losses = run.metrics("train")
    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*CARRY, "train.context_parallel_size=2", nproc=2))
    assert run.metrics("train") == pytest.approx(losses, abs=1e-4)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.layers=[{mixer: tssa}]", "model.positions=64"], ["model.positions null"]),
        (["data.reset_at_documents=false"], ["data.reset_at_documents true"]),
        (["data.within_documents=true"], ["without within_documents"]),
    ],
)
def test_what_does_not_go_together(run: Run, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError, match=r"data\.stateful") as error:
        run.config(*CARRY, *overrides)
    for word in words:
        assert word in str(error.value)
