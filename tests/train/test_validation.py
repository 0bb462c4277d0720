"""Evaluation in training: the same on any number of ranks, and as `tostlm eval perplexity` has it."""

import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, fail, succeed
from tests.processes import on_ranks
from tests.train.run_helpers import blend, zero_options
from tostlm.checkpoint import load_checkpoint
from tostlm.data import VALIDATION, TokenSet, choose_targets
from tostlm.eval import TostModel, score_contexts
from tostlm.launch import RankInfo
from tostlm.train.batches import Batch, RankBatches, open_data
from tostlm.train.engine import compute_loss, context_parallel_group, start_engine
from tostlm.train.validation import validate

CONTEXTS = (16, 32, 160)
SETTINGS = [(0, 1), (3, 1), (3, 2)]  # ZeRO stage and context-parallel size
SEQUENCES = (1, 8)  # of an evaluation; a pass of four ranks reads up to eight


def keys(sequences: int) -> list[str]:
    return [f"train.eval_tokens={64 * sequences}", f"train.eval_contexts={list(CONTEXTS)}"]


def evaluations(run: Run, sets: list[str], rank: int, world_size: int) -> dict[tuple[int, int, int], dict[str, float]]:
    """The numbers of evaluations by stage, context-parallel size and number of sequences."""
    ranks, found = RankInfo(rank, rank, world_size), {}
    for stage, size in SETTINGS:
        if world_size % size:
            continue
        group = context_parallel_group(size)
        for sequences in SEQUENCES:
            split = [f"train.context_parallel_size={size}", *keys(sequences), *sets]
            config = run.config(*zero_options(stage), *split)
            data = open_data(config, world_size)
            engine = start_engine(config, data.plan, ranks)
            batches = RankBatches(data, ranks, torch.device("cpu"), group)
            numbers = validate(engine, data.held_out, batches, data.tokenizer, lambda name: nullcontext())
            found[stage, size, sequences] = numbers
    return found


def test_an_evaluation_is_the_same_on_any_number_of_ranks(run: Run, data: Path, digits: Path, tmp_path: Path) -> None:
    sets = blend((data, 3), (digits, 1))
    by_world_size = {
        world_size: on_ranks(world_size, partial(evaluations, run, sets), tmp_path / str(world_size))
        for world_size in (1, 2, 4)
    }
    expected = {sequences: by_world_size[1][0][0, 1, sequences] for sequences in SEQUENCES}
    assert len({numbers["loss"] for numbers in expected.values()}) == len(SEQUENCES)
    for world_size, of_ranks in by_world_size.items():
        assert all(numbers == of_ranks[0] for numbers in of_ranks)
        assert len(of_ranks[0]) == len(SEQUENCES) * (2 if world_size == 1 else 3)
        for (_, _, sequences), numbers in of_ranks[0].items():
            assert numbers == pytest.approx(expected[sequences], rel=1e-6)


def test_training_reports_what_an_evaluation_of_its_checkpoint_finds(run: Run, data: Path) -> None:
    said = succeed(run.train(*keys(5), "train.eval_every_steps=3", "train.save_weights=false"))
    checkpoint, tokens = load_checkpoint(run.dir), TokenSet(data, VALIDATION)
    targets = choose_targets(tokens, CONTEXTS, 64 * 5 // max(CONTEXTS))
    for score in score_contexts(TostModel(checkpoint), tokens, targets, CONTEXTS):
        loss, bits = (f"{name}_at_{score.context}" for name in ("loss", "bits_per_byte"))
        assert run.metrics("validation", loss)[6] == pytest.approx(score.nats, abs=1e-5)
        assert run.metrics("validation", bits)[6] == pytest.approx(score.bits_per_byte, abs=1e-5)
        assert f"  at {score.context} {run.metrics('validation', loss)[6]:.4f}" in said
    assert set(run.metrics("validation", "loss_at_16")) == {3, 6}


def test_the_folders_of_a_blend_have_numbers_of_their_own(run: Run, data: Path, digits: Path) -> None:
    """Each those of its own sequences; and the whole is all of them."""
    sets = [*blend((data, 3), (digits, 1)), "train.eval_tokens=512", "train.eval_contexts=[16]"]
    succeed(run.train(*sets))
    checkpoint = load_checkpoint(run.dir)
    opened = open_data(checkpoint.config, 1)
    losses: dict[str, list[float]] = {"prepared": [], "digits": []}
    for index in range(8):
        batch = Batch.from_numpy(opened.validation.batch(index, 0, 1))
        losses[opened.validation.set_name(index)].append(float(compute_loss(checkpoint.lm, batch)[0]))
    (last,) = [
        json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines() if "validation" in line
    ]
    for name, own in losses.items():
        assert len(own) in (2, 6)
        assert last[f"loss/{name}"] == pytest.approx(sum(own) / len(own), abs=1e-5)
        assert last[f"loss_at_16/{name}"] > 0 and last[f"bits_per_byte/{name}"] > 0
    assert last["loss"] == pytest.approx(sum(map(sum, losses.values())) / 8, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.eval_contexts=[90000]"], "train.eval_contexts: no held-out document of"),
        (["train.eval_contexts=[1]"], "train.eval_contexts.0=1"),
        (
            ["train.eval_contexts=[128]", "model.positions=64"],
            "train.eval_contexts 128 is longer than model.positions 64",
        ),
        (
            ["train.eval_contexts=[33]", "train.context_parallel_size=2"],
            "train.eval_contexts 33 does not split over train.context_parallel_size 2; try 32",
        ),
    ],
)
def test_contexts_that_cannot_be_scored(run: Run, overrides: list[str], words: str) -> None:
    fail(run.train(*overrides, nproc=2), words)


def test_a_deep_model_at_stage_3_is_saved_right_after_an_evaluation(run: Run) -> None:
    """A pass forward fetches the weights of the layers to come; those of one that no pass follows are let go."""
    deep = ["model.depth=6", "train.eval_every_steps=3", "train.save_every_steps=3"]
    succeed(run.train(*zero_options(3), *deep, nproc=2))
    assert set(run.metrics("validation", "loss")) == {3, 6}
