"""Runs that begin from a checkpoint of another run."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tostlm.checkpoint import TrainState, checkpoint_folder, checkpoints, read_train_state
from tostlm.checkpoint.branch import branch, require_same_origin
from tostlm.checkpoint.integrity import COMPLETE
from tostlm.checkpoint.rollback import record_rollback
from tostlm.checkpoint.weights_only import write_weights
from tostlm.config import dump_config
from tostlm.data import PreparationSettings, Tokenizer, prepare
from tostlm.doctor import run_inputs
from tostlm.errors import UserError
from tostlm.model import create_lm
from tostlm.train.batches import open_data
from tostlm.train.trainer import check_run

WSD = ["optimizer.schedule=wsd", "optimizer.decay_steps=2", "train.steps=5"]


@pytest.fixture(scope="module")
def plateau(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has a checkpoint of step 3, at a constant rate, and of step 6."""
    run = Run(tmp_path_factory.mktemp("plateau"), data)
    succeed(run.train("optimizer.schedule=wsd", "optimizer.decay_steps=2", "train.spike_zscore=9"))
    return run


def origin(plateau: Run) -> Path:
    return checkpoint_folder(plateau.dir, 3)


@pytest.mark.parametrize(("nproc", "stage"), [(1, 1), (2, 3)])
def test_a_branch_is_the_run_that_had_gone_its_way_from_the_start(
    plateau: Run, tmp_path: Path, data: Path, nproc: int, stage: int
) -> None:
    zero = f"deepspeed.zero_optimization.stage={stage}"
    (tmp_path / "whole").mkdir()
    (tmp_path / "short").mkdir()
    whole, short = Run(tmp_path / "whole", data), Run(tmp_path / "short", data)
    succeed(whole.train(*WSD, zero, nproc=nproc))
    said = succeed(short.train(*WSD, zero, "--from", str(origin(plateau)), nproc=nproc))
    assert f"begins from {origin(plateau)}, at step 3" in said
    expected = {step: loss for step, loss in whole.metrics("train").items() if step > 3}
    assert short.metrics("train") == (expected if (nproc, stage) == (1, 1) else pytest.approx(expected, abs=1e-5))
    assert [read_train_state(path).branched_from for path in checkpoints(short.dir)] == [str(origin(plateau))] * 2


@pytest.mark.parametrize(
    ("nproc", "stage", "options"),
    [
        (1, 1, []),
        pytest.param(1, 0, ["train.ema_decay=0.9"], marks=pytest.mark.slow),
        pytest.param(2, 3, [], marks=pytest.mark.slow),
        (2, 2, ["optimizer.name=muon", "optimizer.muon.normuon_beta2=0.95", "optimizer.muon.newton_schulz_dtype=fp32"]),
    ],
    ids=str,
)
def test_a_run_from_initial_weights_alone_is_the_run_from_scratch(
    run: Run, tmp_path: Path, data: Path, nproc: int, stage: int, options: list[str]
) -> None:
    """Its optimizer starts anew, as that of a run without checkpoints does."""
    options = [*options, f"deepspeed.zero_optimization.stage={stage}"]
    config, weights = run.config(*options), tmp_path / "weights"
    lm, tokenizer = create_lm(config.model, config.seed), Tokenizer.from_folder(data)
    weights.mkdir()
    state = TrainState(step=7, imported_from="elsewhere")  # whose steps are not counted
    write_weights(weights, dict(lm.named_parameters()), dump_config(config).encode(), tokenizer, state)
    succeed(run.train(*options, nproc=nproc))
    expected = run.metrics("train")
    shutil.rmtree(run.dir)
    assert "at step 0" in succeed(run.train(*options, "--from", str(weights), nproc=nproc))
    assert run.metrics("train") == expected


def test_it_goes_on_by_the_same_command_without_the_other_run(plateau: Run, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "checkpoints" / "step-00000003"
    shutil.copytree(origin(plateau), copy)
    command = [*WSD, f"train.branch_from={copy.parent.parent}"]  # the folder of the run stands for its newest
    succeed(run.train(*command))
    losses = run.metrics("train")
    shutil.rmtree(copy.parent.parent)
    shutil.rmtree(checkpoints(run.dir)[-1])
    succeed(run.train(*command))
    assert run.metrics("train") == losses
    assert "finished at step 5" in succeed(run.train(*WSD))  # which resumes without saying where it began
    other = [*command[:-1], f"train.branch_from={origin(plateau)}"]
    fail(run.train(*other), f"began from {copy}, not from train.branch_from {origin(plateau)}; choose another run_dir")


@pytest.mark.parametrize("linked", ["run", "run/checkpoints", "run/checkpoints/step-00000003"])
def test_links_are_no_other_run(plateau: Run, run: Run, tmp_path: Path, linked: str) -> None:
    place = tmp_path / "elsewhere" / linked
    place.parent.mkdir(parents=True)
    place.symlink_to(plateau.dir.parent / linked)
    named = tmp_path / "elsewhere" / "run/checkpoints/step-00000003"
    config = run.config(*WSD, f"train.branch_from={named}")
    newest = branch(config, Tokenizer.from_folder(named))
    for asked in (named, named.parent.parent):
        require_same_origin(run.config(f"train.branch_from={asked}"), newest)
    with pytest.raises(UserError, match="choose another run_dir"):
        require_same_origin(run.config(f"train.branch_from={tmp_path}"), newest)


@pytest.mark.parametrize("name", ["2026", "null", "{", "'"])
def test_a_folder_is_not_read_as_yaml(plateau: Run, run: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(plateau.dir)
    command = ["train", str(run.file), *WSD, "train.steps=7", "--from", name]
    assert "begins from" in succeed(tostlm(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)))


def test_no_folder_at_all(run: Run) -> None:
    fail(run.train("--from", ""), "--from is empty; name a checkpoint of another run, or leave it out")


def test_a_run_that_rolled_back_is_followed(plateau: Run, run: Run, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """From where it goes on, and without the data that it left out."""
    copy = tmp_path / "rolled"
    shutil.copytree(plateau.dir, copy)
    record_rollback(copy, read_train_state(origin(plateau))._replace(data_step=9, rollbacks=1))
    for asked in (copy, checkpoint_folder(copy, 3)):
        config = run.config(*WSD, f"train.branch_from={asked}", f"run_dir={run.dir}-{asked.name}")
        state = read_train_state(branch(config, tokenizer))
        assert (state.step, state.data_step, state.rollbacks) == (3, 9, 0)


def test_a_copy_is_on_the_disk_before_it_counts(
    plateau: Run, run: Run, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, fsync = [], os.fsync

    def record(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "link", refuse)
    newest = branch(run.config(*WSD, f"train.branch_from={origin(plateau)}"), tokenizer)
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    assert files == {path.split(".saving-step-00000003/")[-1] for path in synced if not Path(path).is_dir()} & files


def test_a_full_disk_names_the_run(plateau: Run, run: Run, small_disk: Path, tokenizer: Tokenizer) -> None:
    (small_disk / "fill").write_bytes(b"x" * 1_900_000)
    config = run.config(*WSD, f"train.branch_from={origin(plateau)}", f"run_dir={small_disk}/run")
    with pytest.raises(UserError, match=f"cannot be copied to {small_disk}/run: No space left on device"):
        branch(config, tokenizer)
    assert not list(small_disk.rglob(".saving-*"))


def test_no_file_outside_of_a_checkpoint_is_its_own(
    plateau: Run, run: Run, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    copy = tmp_path / "step-00000003"
    shutil.copytree(origin(plateau), copy)
    (tmp_path / "evil").write_bytes(b"")
    checksums = json.loads((copy / COMPLETE).read_text())
    empty = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (copy / COMPLETE).write_text(json.dumps({**checksums, "../evil": empty}))
    with pytest.raises(UserError, match="has no readable COMPLETE"):
        branch(run.config(*WSD, f"train.branch_from={copy}"), tokenizer)


def test_other_data_are_read_from_their_start(
    plateau: Run, run: Run, corpus: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.3), tokenizer, other)
    curriculum = "data.curriculum=[{until_step: 2, context_tokens: 32}]"  # whose stages go by steps
    keys = {f"data.path={other}": 0, "train.batch_tokens=1024": 0, "optimizer.lr=1e-3": 3, curriculum: 3}
    for key, steps in keys.items():
        config = run.config(*WSD, key, f"train.branch_from={origin(plateau)}", f"run_dir={tmp_path / key[:8]}")
        newest = check_run(config, open_data(config, 1))
        assert newest is not None
        state = read_train_state(newest)
        assert (state.step, state.data_step) == (3, steps)
        assert bool(state.good_losses) == (key == "optimizer.lr=1e-3")
        (tmp_path / key[:8] / ".lock").unlink()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["model.width=64"], "has model.width=32, this run model.width=64; a run that begins from it needs its"),
        (["optimizer.name=muon"], "has optimizer.name=adamw, this run optimizer.name=muon"),
        (["deepspeed.bf16.enabled=true"], "has precision=fp32, this run precision=bf16"),
        (["train.steps=3", "optimizer.decay_steps=1"], "train.steps 3 is not above step 3 of"),
        (["train.branch_from=nowhere"], "nowhere is neither a checkpoint nor the folder of a run"),
    ],
)
def test_what_cannot_be_begun(plateau: Run, run: Run, keys: list[str], words: str) -> None:
    """It is said before any rank starts; a doctor says it too."""
    branch_from = f"train.branch_from={origin(plateau)}"
    fail(run.train(*WSD, branch_from, *keys, nproc=2), words)
    assert not run.dir.exists()
    finding = run_inputs.check_resume(run.config(*WSD, branch_from, *keys))
    assert finding.level == "FAIL" and words in finding.measured


def test_a_run_is_no_branch_of_itself_or_of_what_is_damaged(plateau: Run, run: Run, tmp_path: Path) -> None:
    fail(plateau.train(*WSD, "train.steps=9", "--from", str(origin(plateau))), "began anew, not from train.branch_from")
    inside = f"run_dir={plateau.dir}/checkpoints/decay"
    fail(run.train(*WSD, inside, "--from", str(origin(plateau))), "or in it; choose another run_dir")
    copy = tmp_path / "step-00000003"
    shutil.copytree(origin(plateau), copy)
    (copy / "weights.safetensors").write_bytes(b"")
    fail(run.train(*WSD, "--from", str(copy)), f"checkpoint {copy} is damaged: weights.safetensors has 0 bytes, not")
    fail(
        tostlm("submit", "pretrain", str(run.file), *WSD, "train.branch_from=nowhere", "--dry-run"),
        "nowhere is neither a checkpoint nor the folder of a run that saved one",
    )
