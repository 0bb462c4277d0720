"""`tostlm doctor` on real ranks: healthy ranks, and one that is slow, wrong, stopped or missing."""

import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tests.doctor.rank_processes import DoctorRanks

pytestmark = pytest.mark.timed

RANK_CHECKS = ["versions", "devices", "config", "gemm", "disk", "data", "resume"]
CHECKS = [*RANK_CHECKS, "all-reduce", "ring", "clock"]


def break_everything() -> None:
    version, matmul, now = importlib.metadata.version, torch.matmul, time.time
    importlib.metadata.version = lambda name: "0.0.1" if name == "deepspeed" else version(name)
    torch.matmul = lambda a, b: matmul(a, b) * 1.001
    time.time = lambda: now() + 100


def stop_in_a_collective() -> None:
    torch.distributed.all_reduce = lambda x: os.kill(os.getpid(), signal.SIGSTOP)


def levels(printed: str) -> dict[str, str]:
    return {line.split()[1]: line.split()[0] for line in printed.splitlines()}


def test_healthy_ranks_pass_and_leave_nothing(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    printed = succeed(tostlm("doctor", str(run.file), "--nproc", "2", "--out", str(out)))
    assert levels(printed) == dict.fromkeys(CHECKS, "ok"), printed
    assert not run.dir.exists()
    content = json.loads(out.read_text())
    assert (content["healthy"], content["exclude"]) == (True, [])
    assert [check["check"] for check in content["checks"]] == CHECKS


@pytest.mark.slow
def test_torchrun_is_a_launcher(run: Run) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tostlm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += ["doctor", str(run.file)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120, env=environment)
    assert levels(done.stdout) == dict.fromkeys(CHECKS, "ok")


@pytest.mark.slow
def test_all_failures_are_reported_at_once(run: Run, tmp_path: Path, data: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    content = bytearray((copy / "train-00000.bin").read_bytes())
    content[100] ^= 1
    (copy / "train-00000.bin").write_bytes(content)
    wrong = [f"data.path={copy}", "run_dir=/proc/nowhere", "train.batch_tokens=576", "train.micro_batch_tokens=128"]
    result = tostlm("doctor", str(run.file), *wrong)
    words = [f"{copy}/train-00000.bin is damaged", "cannot write in /proc/nowhere", "try train.batch_tokens="]
    fail(result, *words)
    failed = [check for check, level in levels(result.stdout).items() if level == "FAIL"]
    assert failed == ["config", "disk", "data"]


def test_a_rank_with_several_faults_is_named(run: Run, tmp_path: Path) -> None:
    """Its matrix products are 0.1% too large, its DeepSpeed version differs, its clock is ahead."""
    out = tmp_path / "doctor.json"
    with DoctorRanks(str(run.file), "--out", str(out), failing_rank=1, fault=break_everything) as ranks:
        code, printed, stderr = ranks.end()
        assert (code, len(stderr.splitlines())) == (2, 1), stderr
        assert ranks.end(1) == (0, "", "")
    found = levels(printed)
    assert {check: found[check] for check in ("versions", "gemm", "clock")} == {
        "versions": "FAIL",
        "gemm": "FAIL",
        "clock": "warn",
    }
    assert "versions: rank 1 on node1 is unhealthy: deepspeed is 0.0.1 on rank 1" in stderr
    assert "gemm: rank 1 on node1 is unhealthy: matrix products are off" in stderr
    assert "exclude node1" in stderr and "node0" not in stderr
    assert "rank 1 on node1: +100.0 s" in printed
    assert json.loads(out.read_text())["exclude"] == ["node1"]


def test_a_slow_rank_is_named(run: Run) -> None:
    with DoctorRanks(str(run.file)) as ranks:
        ranks.wait_for("config")
        with ranks.slowed(1, share=0.05):
            line = ranks.wait_for("gemm")
        code, _, stderr = ranks.end()
    assert code == 2
    assert line.startswith("FAIL  gemm        rank 1 on node1 is unhealthy: 0.")
    assert "of the median" in stderr and stderr.rstrip().endswith("exclude node1")


def test_a_stopped_rank_is_named(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "doctor.json"
    with DoctorRanks(str(run.file), "--timeout-seconds", "6", "--out", str(out)) as ranks:
        ranks.wait_for("config")
        ranks.programs[1].send_signal(signal.SIGSTOP)
        code, printed, stderr = ranks.end()
    assert code == 2
    assert printed.splitlines()[-1].startswith("FAIL  gemm        rank 1 on node1 is unhealthy: no answer within 6 s")
    assert stderr.startswith("tostlm: error: gemm: rank 1 on node1") and len(stderr.splitlines()) == 1
    assert json.loads(out.read_text())["exclude"] == ["node1"]


@pytest.mark.slow
def test_a_rank_stopped_in_a_collective_is_named(run: Run) -> None:
    """All ranks time out; the one that does not report its timeout is at fault."""
    arguments = [str(run.file), "train.batch_tokens=384", "--timeout-seconds", "6"]
    with DoctorRanks(*arguments, world_size=3, failing_rank=2, fault=stop_in_a_collective) as ranks:
        code, _, stderr = ranks.end()
        assert ranks.end(1) == (0, "", "")
    assert code == 2
    assert stderr == "tostlm: error: all-reduce: rank 2 on node2 is unhealthy: no answer within 6 s; exclude node2\n"


def test_missing_ranks_are_reported_on_both_sides(run: Run) -> None:
    timeout = ("--timeout-seconds", "2")
    with (
        DoctorRanks(str(run.file), *timeout, world_size=3, only=0) as first,
        DoctorRanks(str(run.file), *timeout, only=1) as second,
    ):
        code, _, stderr = first.end()
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert "rank(s) 1, 2 of 3 did not arrive within 2 s" in stderr
        code, _, stderr = second.end(1)
        assert (code, len(stderr.splitlines())) == (2, 1)
        assert "on rank 1: rank 0 does not answer at 127.0.0.1:" in stderr
