"""slurm/prepare.sbatch on a real Slurm: shares, a killed task, the merge that waits for all."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, succeed, tostlm
from tests.data.test_prepare import content
from tests.slurm.cluster import cluster, install
from tostlm.data import Tokenizer

pytestmark = pytest.mark.alone


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    reason = install()
    if reason:
        pytest.skip(reason)
    with cluster(tmp_path / "slurm") as environment:
        bin_folder = Path(sys.executable).parent
        yield {**environment, "PATH": f"{bin_folder}:{environment['PATH']}", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], cwd: Path, *command: str) -> str:
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def wait_until(happened: Callable[[], object], logs: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "\n".join(path.read_text() for path in logs.glob("*.log"))
        time.sleep(0.05)


def test_an_array_of_tasks_one_of_them_killed(
    slurm: dict[str, str], speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(10) for text in speeches)
    options = [
        "--source",
        "text.jsonl",
        "--tokenizer",
        "t.model",
        "--part-bytes",
        "300000",
        "--heldout-fraction",
        "0.1",
    ]
    succeed(tostlm("prepare", *options, "--out", "whole", cwd=tmp_path))

    script = str(ROOT / "slurm" / "prepare.sbatch")
    command = ["sbatch", "--parsable", "--array=0-2", "--cpus-per-task=2", script, *options, "--out", "out"]
    job = run(slurm, tmp_path, *command)
    merge = ["--wrap", "tostlm prepare --merge --out out"]
    run(slurm, tmp_path, "sbatch", f"--dependency=afterok:{job}", "--output=merge.log", *merge)
    wait_until(lambda: list((tmp_path / "out" / "parts").glob("0*/part.json")), tmp_path)
    run(slurm, tmp_path, "scontrol", "requeue", f"{job}_1")  # kills it, and starts it again
    finished = list((tmp_path / "out" / "parts").glob("0*/part.json"))
    before = {path: path.stat().st_mtime_ns for path in finished if path.exists()}
    wait_until(lambda: (tmp_path / "out" / "manifest.json").exists(), tmp_path)
    wait_until(lambda: not (tmp_path / "out" / "parts").exists(), tmp_path)
    assert before
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("prepare-*.log")) == [f"prepare-{job}_{n}.log" for n in range(3)]
    assert os.path.getsize(tmp_path / "merge.log")  # noqa: PTH202
