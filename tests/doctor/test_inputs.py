"""What a run reads and where it writes, as one host finds it."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Run
from tostlm.checkpoint.layout import COMPLETE, PROGRESS, TrainState, checkpoint_folder
from tostlm.data import Tokenizer, train_tokenizer
from tostlm.doctor import disk, inputs
from tostlm.doctor.finding import FAIL, OK
from tostlm.errors import UserError


def test_all_of_small_data_is_read(run: Run, data: Path) -> None:
    found = inputs.measure(run.config(), 0)
    sizes = [path.stat().st_size for path in data.iterdir() if path.suffix in (".bin", ".ends", ".hashes")]
    assert (found.checked_bytes, found.total_bytes) == (sum(sizes), sum(sizes))
    assert inputs.judge([(0, found)], ["a"]).level == OK


def test_a_sample_of_large_data_is_another_on_each_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "SAMPLE_BYTES", 1)
    found = [inputs.measure(run.config(), rank) for rank in range(8)]
    assert len({own.checked_bytes for own in found}) > 1
    assert 0 < found[0].checked_bytes < found[0].total_bytes
    assert " of " in inputs.judge([(0, found[0])], ["a"]).measured


def test_a_budget_is_kept_to() -> None:
    sizes = {str(n): 10 + n for n in range(10)}
    chosen = inputs._sample(sizes, 50, seed=0)
    assert 30 < sum(sizes[name] for name in chosen) <= 50
    assert len(inputs._sample(sizes, 1, seed=0)) == 1


def test_a_tokenizer_that_does_not_fit_the_model(run: Run) -> None:
    found = inputs.measure(run.config("model.vocab_size=300"), 0)
    verdict = inputs.judge([(0, found)], ["a"])
    assert verdict.level == FAIL
    assert "model.vocab_size 300 is smaller than the 512 pieces" in verdict.measured


def test_data_of_one_host_alone_are_its_fault() -> None:
    whole, other = inputs.Data("x", 1, 1, ""), inputs.Data("y", 1, 1, "")
    lost = inputs.Data("", 0, 0, "d/train-00000.bin cannot be read: Input/output error")
    hosts = ["a", "a", "b", "b"]
    assert inputs.judge([(0, whole), (2, other)], hosts).unfit == (2,)
    assert inputs.judge([(0, whole), (2, lost)], hosts).unfit == (2,)
    assert inputs.judge([(0, lost), (2, lost)], hosts).unfit == ()


def save(run: Run, tokenizer: Tokenizer) -> Path:
    """A checkpoint as far as resuming is judged."""
    folder = checkpoint_folder(run.dir, 3)
    folder.mkdir(parents=True)
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)
    (folder / PROGRESS).write_text(json.dumps(TrainState(step=3)._asdict()))
    (folder / COMPLETE).touch()
    return folder


def test_resuming(run: Run, tokenizer: Tokenizer) -> None:
    assert "starts at step 0" in inputs.resumption(run.config()).measured
    folder = save(run, tokenizer)
    verdict = inputs.resumption(run.config())
    assert (verdict.level, verdict.measured) == (OK, f"from step 3, {folder}")
    (folder / PROGRESS).write_text("{")
    assert inputs.resumption(run.config()).level == FAIL


def test_resuming_with_another_tokenizer(run: Run, speeches: list[str], tmp_path: Path) -> None:
    save(run, train_tokenizer(speeches, 400, tmp_path / "other.model"))
    verdict = inputs.resumption(run.config())
    assert verdict.level == FAIL
    assert "was trained with another tokenizer" in verdict.measured


def test_a_disk_too_small_for_a_checkpoint(run: Run, small_disk: Path) -> None:
    config = run.config(f"run_dir={small_disk}/run", "model.width=256")
    with disk.marked(config.run_dir):
        found = disk.measure(config, 0)
    assert (found.shared, found.error) == (True, "")
    verdict = disk.judge([(0, found)], config, ["a"])
    assert verdict.level == FAIL
    assert "2.1 MB free" in verdict.measured
    assert list(small_disk.iterdir()) == []


def test_the_room_counted_is_what_a_checkpoint_takes(trained: dict[str, Run]) -> None:
    for run in trained.values():
        files = (checkpoint_folder(run.dir, 6)).rglob("*.safetensors")
        taken = sum(file.stat().st_size for file in files)
        assert 1 <= taken / disk.checkpoint_bytes(run.config()) < 1.1  # their headers


def test_a_full_disk(run: Run, small_disk: Path) -> None:
    config = run.config(f"run_dir={small_disk}/run", "model.width=256")
    with disk.marked(config.run_dir):
        room = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(b"x" * room.f_bavail * room.f_frsize)
        found = disk.measure(config, 0)
    verdict = disk.judge([(0, found)], config, ["a"])
    assert verdict.level == FAIL
    assert "cannot write in" in verdict.measured and "No space left on device" in verdict.measured


def test_a_host_that_does_not_share_the_folder(run: Run) -> None:
    assert not disk.measure(run.config(), 1).shared


def test_nothing_is_left_of_what_was_written(run: Run) -> None:
    config = run.config()
    with disk.marked(config.run_dir):
        assert disk.measure(config, 0).write_bytes_per_second > 0
    assert not run.dir.exists()
    run.dir.mkdir()
    with disk.marked(config.run_dir):
        disk.measure(config, 0)
    assert list(run.dir.iterdir()) == []
    with pytest.raises(UserError, match="cannot write in /proc/nowhere"), disk.marked(Path("/proc/nowhere")):
        pass
