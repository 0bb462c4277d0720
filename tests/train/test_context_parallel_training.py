"""Sequences split over ranks train as whole ones do, and so do recomputed and compiled blocks."""

import shutil
from pathlib import Path

import pytest

from tests.conftest import Run, fail, succeed
from tests.train.run_helpers import REPORTED, zero_options
from tostlm.checkpoint import checkpoints
from tostlm.config import batch_plan
from tostlm.errors import UserError
from tostlm.model import LM
from tostlm.train.engine import deepspeed_dict, prepare_blocks

HYBRID = ["model.layers=[{mixer: tssa}, {mixer: softmax}]", "model.positions=64", "data.reset_at_documents=true"]
SPLIT = [*HYBRID, "train.context_parallel_size=2"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One process, which holds whole sequences."""
    run = Run(tmp_path_factory.mktemp("whole"), data)
    succeed(run.train(*HYBRID, *zero_options(0)))
    return run


def assert_alike(run: Run, whole: Run) -> None:
    for kind, key in REPORTED:
        assert run.metrics(kind, key) == pytest.approx(whole.metrics(kind, key), rel=1e-4), (kind, key)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_every_stage_trains_on_split_sequences(run: Run, whole: Run, stage: int) -> None:
    succeed(run.train(*SPLIT, *zero_options(stage), nproc=2))
    assert_alike(run, whole)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=SLOW), 3])
def test_recomputed_blocks_train_alike(run: Run, whole: Run, stage: int) -> None:
    succeed(run.train(*SPLIT, *zero_options(stage), "train.activation_checkpointing_every=1", nproc=2))
    assert_alike(run, whole)


def test_which_blocks_are_recomputed(run: Run) -> None:
    """Nothing else shows it: the numbers are the same bit for bit."""
    lm = LM(run.config().model)
    prepare_blocks(lm, run.config("train.activation_checkpointing_every=2"))
    assert lm.activation_checkpointing_every == 2


@SLOW
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks_train_alike(run: Run, whole: Run, ranks: int) -> None:
    """One of the two is computed again too. The exchange between ranks is left out of what is compiled."""
    compiled = ["train.compile=true", "train.activation_checkpointing_every=2"]
    succeed(run.train(*(HYBRID if ranks == 1 else SPLIT), *zero_options(1), *compiled, nproc=ranks))
    assert_alike(run, whole)
    assert run.metrics("train") != whole.metrics("train")  # fused operations round otherwise


def test_several_groups_of_ranks_train_alike(run: Run, whole: Run) -> None:
    succeed(run.train(*SPLIT, *zero_options(1), nproc=4))
    assert_alike(run, whole)


@SLOW
def test_several_groups_of_ranks_resume_exactly(run: Run) -> None:
    succeed(run.train(*SPLIT, *zero_options(1), nproc=4))
    before = {key: run.metrics(*key) for key in REPORTED}
    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*SPLIT, *zero_options(1), nproc=4))
    assert {key: run.metrics(*key) for key in REPORTED} == before


def test_batches_of_groups(run: Run) -> None:
    """A pass of a group holds the tokens of all its ranks; DeepSpeed's own sum counts each rank's sequences."""
    config = run.config("train.context_parallel_size=4", "train.micro_batch_tokens=32")
    assert batch_plan(config, 8) == (8, 2, 2)
    derived = deepspeed_dict(config, batch_plan(config, 8))
    assert derived["train_batch_size"] == 32
    assert derived["train_micro_batch_size_per_gpu"] * derived["gradient_accumulation_steps"] * 8 == 32


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["train.context_parallel_size=3"],
            "a context of 64 tokens does not split over train.context_parallel_size 3; try 63",
        ),
        (
            [*HYBRID, "train.context_parallel_size=4"],
            "model.heads 2 do not split over train.context_parallel_size 4, as softmax layers need; try "
            "train.context_parallel_size=2",
        ),
    ],
)
def test_what_does_not_split(run: Run, overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run.config(*overrides)


def test_ranks_that_make_no_whole_groups(run: Run) -> None:
    line = fail(
        run.train("train.context_parallel_size=2", nproc=3),
        "3 ranks do not form whole groups of train.context_parallel_size 2",
    )
    assert "start a multiple of it" in line
