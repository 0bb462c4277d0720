"""Checks of what a run reads and where it writes, as one host finds it."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Run
from tostlm.checkpoint.integrity import COMPLETE, TRAIN_STATE
from tostlm.checkpoint.layout import TrainState, checkpoint_folder
from tostlm.data import Tokenizer, train_tokenizer
from tostlm.doctor import run_inputs
from tostlm.errors import UserError
from tostlm.launch import RankInfo
from tostlm.plan import checkpoint_bytes

RANK = RankInfo(0, 0, 1)


def test_small_data_is_checksummed_completely(run: Run, data: Path) -> None:
    found = run_inputs.measure_data(run.config(), RANK)
    sizes = [path.stat().st_size for path in data.iterdir() if path.suffix in (".bin", ".ends", ".hashes")]
    assert (found.checked_bytes, found.total_bytes) == (sum(sizes), sum(sizes))
    assert run_inputs.check_data({0: found}, ["a"]).level == "ok"


def test_each_host_checksums_another_sample_of_large_data(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_inputs, "SAMPLE_BYTES", 1)
    found = [run_inputs.measure_data(run.config(), RankInfo(rank, 0, 8)) for rank in range(8)]
    assert len({own.checked_bytes for own in found}) > 1
    assert 0 < found[0].checked_bytes < found[0].total_bytes
    assert " of " in run_inputs.check_data({0: found[0]}, ["a"]).measured


def test_a_sample_stays_within_its_budget() -> None:
    sizes = {str(n): 10 + n for n in range(10)}
    chosen = run_inputs._choose_sample(sizes, 50, seed=0)
    assert 30 < sum(sizes[name] for name in chosen) <= 50
    assert len(run_inputs._choose_sample(sizes, 1, seed=0)) == 1


def test_a_tokenizer_larger_than_the_vocabulary_fails(run: Run) -> None:
    found = run_inputs.measure_data(run.config("train.eval_contexts=[50000]"), RANK)
    finding = run_inputs.check_data({0: found}, ["a"])
    assert finding.level == "FAIL" and "longer than 50000 tokens" in finding.measured
    found = run_inputs.measure_data(run.config("model.vocab_size=300"), RANK)
    finding = run_inputs.check_data({0: found}, ["a"])
    assert finding.level == "FAIL"
    assert "model.vocab_size 300 is smaller than the 512 pieces" in finding.measured


def test_a_host_whose_data_differ_is_unhealthy() -> None:
    whole, other = run_inputs.PreparedData("x", 1, 1, ""), run_inputs.PreparedData("y", 1, 1, "")
    lost = run_inputs.PreparedData("", 0, 0, "d/train-00000.bin cannot be read: Input/output error")
    hosts = ["a", "a", "b", "b"]
    assert run_inputs.check_data({0: whole, 2: other}, hosts).unhealthy_ranks == (2,)
    assert run_inputs.check_data({0: whole, 2: lost}, hosts).unhealthy_ranks == (2,)
    assert run_inputs.check_data({0: lost, 2: lost}, hosts).unhealthy_ranks == ()


def save(run: Run, tokenizer: Tokenizer) -> Path:
    """Write what the resume check reads of a checkpoint."""
    folder = checkpoint_folder(run.dir, 3)
    folder.mkdir(parents=True)
    (folder / tokenizer.file_name).write_bytes(tokenizer.content)
    (folder / TRAIN_STATE).write_text(json.dumps(TrainState(step=3)._asdict()))
    (folder / COMPLETE).touch()
    return folder


def test_resume_reports_the_newest_step(run: Run, tokenizer: Tokenizer) -> None:
    assert "starts at step 0" in run_inputs.check_resume(run.config()).measured
    folder = save(run, tokenizer)
    finding = run_inputs.check_resume(run.config())
    assert (finding.level, finding.measured) == ("ok", f"from step 3, {folder}")
    (folder / TRAIN_STATE).write_text("{")
    assert run_inputs.check_resume(run.config()).level == "FAIL"


def test_resume_with_another_tokenizer_fails(run: Run, speeches: list[str], tmp_path: Path) -> None:
    save(run, train_tokenizer(speeches, 400, tmp_path / "other.model"))
    finding = run_inputs.check_resume(run.config())
    assert finding.level == "FAIL"
    assert "was trained with another tokenizer" in finding.measured


def test_a_disk_too_small_for_a_checkpoint_fails(run: Run, small_disk: Path) -> None:
    config = run.config(f"run_dir={small_disk}/run", "model.width=256")
    with run_inputs.marked_run_dir(config.run_dir):
        found = run_inputs.measure_disk(config, RANK)
    assert (found.shared, found.error) == (True, "")
    finding = run_inputs.check_disk({0: found}, config, ["a"])
    assert finding.level == "FAIL"
    assert "2.1 MB free" in finding.measured
    assert list(small_disk.iterdir()) == []


def test_checkpoint_bytes_match_a_real_checkpoint(trained: dict[str, Run]) -> None:
    for run in trained.values():
        files = (checkpoint_folder(run.dir, 6)).rglob("*.safetensors")
        taken = sum(file.stat().st_size for file in files)
        assert 1 <= taken / checkpoint_bytes(run.config()) < 1.1  # their headers


def test_a_full_disk_fails(run: Run, small_disk: Path) -> None:
    config = run.config(f"run_dir={small_disk}/run", "model.width=256")
    with run_inputs.marked_run_dir(config.run_dir):
        stats = os.statvfs(small_disk)
        (small_disk / "ballast").write_bytes(b"x" * stats.f_bavail * stats.f_frsize)
        found = run_inputs.measure_disk(config, RANK)
    finding = run_inputs.check_disk({0: found}, config, ["a"])
    assert finding.level == "FAIL"
    assert "cannot write in" in finding.measured and "No space left on device" in finding.measured


def test_a_missing_marker_means_the_folder_is_not_shared(run: Run) -> None:
    assert not run_inputs.measure_disk(run.config(), RANK).shared


def test_the_disk_check_leaves_no_files(run: Run) -> None:
    config = run.config()
    with run_inputs.marked_run_dir(config.run_dir):
        assert run_inputs.measure_disk(config, RANK).write_bytes_per_second > 0
    assert not run.dir.exists()
    run.dir.mkdir()
    with run_inputs.marked_run_dir(config.run_dir):
        run_inputs.measure_disk(config, RANK)
    assert list(run.dir.iterdir()) == []
    with (
        pytest.raises(UserError, match="cannot write in /proc/nowhere"),
        run_inputs.marked_run_dir(Path("/proc/nowhere")),
    ):
        pass
