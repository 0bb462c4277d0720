"""Checkpoints that survive kills, damage and full disks; unrecognized folders; which checkpoints are kept."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.checkpoint.kills import kill_at_every_point
from tests.conftest import ROOT, Run, fail, succeed
from tests.processes import on_ranks
from tests.train.test_faults import harm
from tests.warm import Program
from tostlm.checkpoint.folders import expired_checkpoints, partial_folder, prune
from tostlm.checkpoint.integrity import find_damage
from tostlm.checkpoint.layout import (
    TrainState,
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    read_recurrent_state,
    read_train_state,
)
from tostlm.checkpoint.load import latest_valid_checkpoint
from tostlm.checkpoint.state_files import FILE_BYTES, assign_files, write_file
from tostlm.config import dump_config
from tostlm.errors import UserError
from tostlm.launch.local import rank_env


@pytest.fixture
def copy(trained: dict[str, Run], run: Run) -> Run:
    """A run with checkpoints of its steps 3 and 6."""
    shutil.copytree(trained["tssa"].dir, run.dir)
    return run


def test_every_file_is_data(trained: dict[str, Run]) -> None:
    for checkpoint in checkpoints(trained["tssa"].dir):
        sums = json.loads((checkpoint / "COMPLETE").read_text())
        files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
        assert files == {*sums, "COMPLETE"}
        assert files == {
            "COMPLETE",
            "config.yaml",
            "train_state.json",
            "state/00000.safetensors",
            "tokenizer.model",
            "weights.safetensors",
        }
        for name in files:
            if name.endswith(".safetensors"):
                assert safetensors.torch.load_file(checkpoint / name)
    assert (checkpoint.parent / "latest").read_text() == f"{checkpoint.name}\n"
    assert not list(checkpoint.parent.glob(".*"))


def test_a_run_says_where_it_was(trained: dict[str, Run]) -> None:
    run = trained["tssa"]
    state = read_train_state(checkpoints(run.dir)[-1])
    assert state == TrainState(
        step=6,
        data_step=6,
        validation_loss=run.metrics("validation")[6],
        optimizer_steps=6,
        world_size=1,
        zero_stage=1,
        data_sha256=state.data_sha256,
    )


def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(run: Run) -> None:
    run.file.write_text(dump_config(run.config("train.keep_last_checkpoints=1", "deepspeed.zero_optimization.stage=0")))
    (newest,) = on_ranks(1, partial(kill_at_every_point, str(run.file)), run.dir.with_name("results"))
    files = ["weights.safetensors", "config.yaml", "tokenizer.model", "train_state.json"]
    written = [*(f"state/0000{number}.safetensors" for number in range(4)), *files]
    operations = [
        *(f"fsync .saving-step-N/{name}" for name in written),
        "replace .saving-step-N/..rank-N.json.partial-N",
        "fsync .saving-step-N/COMPLETE",
        "fsync .saving-step-N/state",
        "fsync .saving-step-N",
        "replace .saving-step-N",  # publishes the checkpoint
        "fsync .",
        "fsync .latest.partial-N",
        "replace .latest.partial-N",
        "rename step-N",  # removes the one before
        "rmtree .removing-step-N",
        "unlink a file of a removed checkpoint",
    ]
    assert list(newest) == [f"{when} {name}" for name in operations for when in ("before", "after")]
    published = list(newest).index("after replace .saving-step-N")
    assert list(newest.values()) == [1] * published + [2] * (len(newest) - published)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(run: Run, kills: int) -> None:
    run.file.write_text(dump_config(run.config("train.keep_last_checkpoints=2")))
    result = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.kills", str(run.file), str(kills)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=550,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit": (lambda folder: flip_a_bit(folder / "state/00000.safetensors"), "00000.safetensors has another checksum"),
    "the end": (lambda folder: os.truncate(folder / "weights.safetensors", 100), "weights.safetensors has 100 bytes"),
    "a file": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml is missing"),
    "all state": (lambda folder: shutil.rmtree(folder / "state"), "00000.safetensors is missing"),
    "the seal": (lambda folder: (folder / "COMPLETE").unlink(), "COMPLETE is missing"),
    "half the seal": (lambda folder: os.truncate(folder / "COMPLETE", 50), "COMPLETE is not as it was written"),
    "a name in the seal": (
        lambda folder: (folder / "COMPLETE").write_text((folder / "COMPLETE").read_text().replace("bytes", "bites", 1)),
        "COMPLETE is not as it was written",
    ),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(copy: Run, capsys: pytest.CaptureFixture[str], what: str) -> None:
    before, newest = checkpoints(copy.dir)
    damage, words = DAMAGES[what]
    damage(newest)
    assert latest_valid_checkpoint(copy.config()) == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tostlm: checkpoint {newest} is quarantined as step-00000006.damaged: {words}")
    assert [path.name for path in checkpoints(copy.dir)] == ["step-00000003"]
    assert (newest.parent / "step-00000006.damaged").is_dir()
    assert latest_valid_checkpoint(copy.config()) == before
    assert not capsys.readouterr().err


def test_a_run_goes_on_from_the_one_before(copy: Run) -> None:
    expected = copy.metrics("train")
    newest = checkpoints(copy.dir)[-1]
    flip_a_bit(newest / "state" / "00000.safetensors")
    result = copy.train()
    succeed(result)
    (line,) = result.stderr.strip().splitlines()
    assert "is quarantined as step-00000006.damaged: 00000.safetensors has another checksum" in line
    assert copy.metrics("train") == expected
    assert latest_valid_checkpoint(copy.config()) == newest


def test_a_file_that_was_not_saved_changes_nothing(copy: Run) -> None:
    before, newest = checkpoints(copy.dir)
    (newest / "weights.safetensors").unlink()
    expected = load_checkpoint(newest).lm.state_dict()
    for name in ("state/00001.safetensors", "recurrent_state.safetensors"):
        shutil.copy(before / "state" / "00000.safetensors", newest / name)
    assert read_recurrent_state(newest) == {}
    assert all(tensor.equal(expected[name]) for name, tensor in load_checkpoint(newest).lm.state_dict().items())


def test_a_checkpoint_under_the_name_of_another_is_refused(copy: Run) -> None:
    newest = checkpoints(copy.dir)[-1]
    newest.rename(newest.with_name("step-00000008"))
    with pytest.raises(UserError, match="step-00000008 holds the checkpoint of step 6; rename it to step-00000006"):
        latest_valid_checkpoint(copy.config())
    newest.with_name("step-00000008").rename(newest)
    assert latest_valid_checkpoint(copy.config()) == newest


def test_a_link_to_a_checkpoint_elsewhere_is_removed_and_no_more(copy: Run, tmp_path: Path) -> None:
    first, last = checkpoints(copy.dir)
    elsewhere = Path(shutil.move(first, tmp_path / "elsewhere"))
    first.symlink_to(elsewhere)
    prune(copy.config("train.keep_last_checkpoints=1"))
    first.with_name(".removing-step-00000001").symlink_to(elsewhere)
    assert latest_valid_checkpoint(copy.config()) == last
    assert {path.name for path in last.parent.iterdir()} == {"latest", last.name}
    assert find_damage(elsewhere) is None


@pytest.mark.parametrize(
    "record", ["", "[]", "{", "{}", '{"step": null}', '{"step": "4"}', '{"data_step": -3}', "[" * 100_000]
)
def test_a_damaged_record_of_a_rollback_is_refused(copy: Run, record: str) -> None:
    file = copy.dir / "checkpoints" / "rollback.json"
    file.write_text(record)
    with pytest.raises(UserError, match=r"rollback.json, the record of a rollback, cannot be read .*; remove it"):
        latest_valid_checkpoint(copy.config())
    assert len(checkpoints(copy.dir)) == 2


def test_nothing_is_begun_anew_over_damaged_checkpoints(copy: Run) -> None:
    for checkpoint in checkpoints(copy.dir):
        flip_a_bit(checkpoint / "state" / "00000.safetensors")
    for _ in range(2):
        with pytest.raises(UserError, match=r"every checkpoint in .* is damaged; bring a copy"):
            latest_valid_checkpoint(copy.config())
    assert len(list((copy.dir / "checkpoints").glob("*.damaged"))) == 2


@pytest.mark.parametrize("folder", ["step-00000009/engine", "global_step9", "checkpoint-9", "step-00000009"])
def test_checkpoints_of_another_kind_are_not_trained_over(copy: Run, folder: str) -> None:
    path = copy.dir / "checkpoints" / folder
    path.mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{folder.partition('/')[0]} is no checkpoint that this version reads"):
        latest_valid_checkpoint(copy.config())
    assert path.is_dir()


def test_a_file_in_the_place_of_a_checkpoint_is_not_trained_over(copy: Run) -> None:
    (copy.dir / "checkpoints" / "step-00000009").touch()
    with pytest.raises(UserError, match="step-00000009 is no checkpoint that this version reads"):
        latest_valid_checkpoint(copy.config())
    shutil.rmtree(copy.dir / "checkpoints")
    (copy.dir / "checkpoints").touch()
    with pytest.raises(UserError, match="checkpoints is no folder; move it elsewhere"):
        latest_valid_checkpoint(copy.config())


def test_what_a_killed_save_left_is_removed(copy: Run) -> None:
    kept = {path.name for path in (copy.dir / "checkpoints").iterdir()}
    for leftover in (".saving-step-00000007/state", ".removing-step-00000001"):
        (copy.dir / "checkpoints" / leftover).mkdir(parents=True)
    (copy.dir / "checkpoints" / ".latest.partial-77").touch()
    assert latest_valid_checkpoint(copy.config()) == checkpoints(copy.dir)[-1]
    assert {path.name for path in (copy.dir / "checkpoints").iterdir()} == kept


def test_a_new_run_has_none(run: Run) -> None:
    assert latest_valid_checkpoint(run.config()) is None


@pytest.mark.parametrize(
    ("free_bytes", "background"), [(100_000, "true"), pytest.param(600_000, "false", marks=pytest.mark.slow)]
)
def test_a_full_disk_while_saving(
    small_disk: Path, trained: dict[str, Run], run: Run, free_bytes: int, background: str
) -> None:
    run.dir = small_disk / "run"
    shutil.copytree(trained["tssa"].dir, run.dir)
    shutil.rmtree(checkpoints(run.dir)[0])
    ballast = small_disk / "ballast"
    room = os.statvfs(small_disk)
    ballast.write_bytes(b"x" * (room.f_bavail * room.f_frsize - free_bytes))
    overrides = [
        f"run_dir={run.dir}",
        "train.steps=9",
        "train.keep_last_checkpoints=1",
        f"train.save_in_background={background}",
    ]
    fail(run.train(*overrides), "checkpoint", "step-00000009 cannot be written: No space left on device", "make room")
    assert {path.name for path in (run.dir / "checkpoints").iterdir()} == {"latest", "step-00000006"}
    assert latest_valid_checkpoint(run.config(*overrides)) == checkpoints(run.dir)[-1]

    ballast.unlink()
    succeed(run.train(*overrides))
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000009"]


def occupy(path: Path, engine: object) -> None:
    path.mkdir(parents=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_ends_all(run: Run, rank: int) -> None:
    unwritten = partial_folder(checkpoint_folder(run.dir, 3))
    its_file = unwritten / "state" / f"0000{rank}.safetensors"
    spoil = partial(harm, 1, partial(occupy, its_file))
    first, second = rank_env(2)
    ranks = [Program("train", str(run.file), before=spoil, **first), Program("train", str(run.file), **second)]
    ended = [rank.end() for rank in ranks]
    assert [done.returncode for done in ended] == [2, 2]
    assert "step-00000003 cannot be written: Is a directory; make room" in ended[0].stderr
    assert "tostlm: error" not in ended[1].stderr
    assert not unwritten.exists()
    assert not checkpoints(run.dir)


def kept(folders: dict[int, float | None], root: Path, **train: object) -> list[int]:
    """Steps of the checkpoints that stay, of some with their held-out losses."""
    run = Run(root, root)
    for step, loss in folders.items():
        folder = checkpoint_folder(root, step)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "train_state.json").write_text(json.dumps(TrainState(step=step, validation_loss=loss)._asdict()))
    found = [checkpoint_folder(root, step) for step in folders]
    config = run.config(*(f"train.{key}={json.dumps(value)}" for key, value in train.items()))
    expired = expired_checkpoints(config, found)
    return [step for step in folders if checkpoint_folder(root, step) not in expired]


def test_what_is_kept(tmp_path: Path) -> None:
    losses: dict[int, float | None] = {10: None, 20: 3.0, 30: 1.0, 40: 1.0, 50: 2.0, 60: 2.5}
    assert kept(losses, tmp_path) == list(losses)
    assert kept(losses, tmp_path, keep_every_steps=20, keep_best_checkpoint=True) == list(losses)
    assert kept(losses, tmp_path, keep_last_checkpoints=2) == [50, 60]
    assert kept(losses, tmp_path, keep_last_checkpoints=9) == list(losses)
    assert kept(losses, tmp_path, keep_last_checkpoints=1, keep_every_steps=20) == [20, 40, 60]
    assert kept(losses, tmp_path, keep_last_checkpoints=1, keep_best_checkpoint=True) == [30, 60]
    assert kept(dict.fromkeys(losses), tmp_path, keep_last_checkpoints=1, keep_best_checkpoint=True) == [60]


def test_what_cannot_be_deleted_is_tried_again(
    copy: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def busy(path: Path) -> None:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    config = copy.config("train.keep_last_checkpoints=1")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        prune(config)
    assert "cannot be deleted yet (Directory not empty); the next save tries again" in capsys.readouterr().err
    assert [path.name for path in checkpoints(copy.dir)] == ["step-00000006"]
    prune(config)
    assert sorted(path.name for path in (copy.dir / "checkpoints").iterdir()) == ["latest", "step-00000006"]


def test_an_old_checkpoint_that_cannot_be_read_ends_no_run(copy: Run) -> None:
    (checkpoints(copy.dir)[0] / "train_state.json").write_bytes(b"\xff")
    succeed(copy.train("train.steps=9", "train.keep_last_checkpoints=2", "train.keep_best_checkpoint=true"))
    assert [path.name for path in checkpoints(copy.dir)] == ["step-00000006", "step-00000009"]


def replace_data(folder: Path, other: Path, engine: object) -> None:
    shutil.copyfile(other / "manifest.json", folder / "manifest.json")


def edit_data(folder: Path, other: Path, engine: object) -> None:
    flip_a_bit(folder / "train-00000.bin")


@pytest.mark.parametrize("change", [replace_data, edit_data])
def test_data_that_changed_since_the_start_are_not_saved_as_those_trained_on(
    run: Run, data: Path, digits: Path, change: Callable[[Path, Path, object], None]
) -> None:
    mine = Path(shutil.copytree(data, run.file.parent / "mine"))
    (place,) = rank_env(1)
    spoil = partial(harm, 5, partial(change, mine, digits))
    ended = Program("train", str(run.file), f"data.path={mine}", before=spoil, **place).end()
    fail(ended, "step-00000006 cannot be written: the data in", "mine changed since training started; put it back")
    assert [path.name for path in checkpoints(run.dir)] == ["step-00000003"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_parameters_are_shared_out_evenly(ranks: int) -> None:
    layers = {f"{kind}{number}": size for number in range(48) for kind, size in (("a", 50 << 20), ("b", 4000))}
    sizes = {"embed": 1 << 30, **layers}
    assigned = assign_files(sizes, ranks)
    assert sorted(name for files in assigned for names in files for name in names) == sorted(sizes)
    full = [[sum(sizes[name] for name in names) for names in files] for files in assigned]
    assert max(map(sum, full)) <= max(1.1 * sum(map(sum, full)) / ranks, sizes["embed"])
    for files, bytes_of_files in zip(assigned, full, strict=True):
        assert files
        for names, size in zip(files, bytes_of_files, strict=True):
            assert size <= 1.1 * FILE_BYTES or names == ["embed"]
    assert assigned == assign_files(dict(reversed(sizes.items())), ranks)  # names and sizes decide


def test_few_parameters_leave_ranks_without_files() -> None:
    assert assign_files({"a": 1, "b": 1}, world_size=3) == [[["a"]], [["b"]], []]


def test_a_file_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "transposed": torch.randn(2, 3).t(),
        "number": torch.tensor(7, dtype=torch.int64),
        "none": torch.empty(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    write_file(tmp_path / "t.safetensors", tensors)
    found = safetensors.torch.load_file(tmp_path / "t.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].equal(tensor)


def test_evaluation_needs_no_weights_file(copy: Run) -> None:
    before = load_checkpoint(copy.dir).lm.state_dict()
    (checkpoints(copy.dir)[-1] / "weights.safetensors").unlink()
    after = load_checkpoint(copy.dir).lm.state_dict()
    assert before.keys() == after.keys()
    assert all(after[name].equal(before[name]) for name in before)
