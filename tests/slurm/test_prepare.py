"""slurm/prepare.sbatch on a real Slurm: an array of tasks, one of them killed, and the merge that waits for all."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, succeed, tostlm
from tests.data.preparation.test_prepare import content
from tests.slurm.cluster import Cluster, wait_until
from tostlm.data import Tokenizer

pytestmark = pytest.mark.timed


def run(environment: dict[str, str], cwd: Path, *command: str) -> str:
    environment = {**environment, "TOSTLM_SITE": str(ROOT / "slurm" / "site.env")}
    result = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_an_array_with_a_killed_task_makes_the_same_data(
    cluster: Cluster, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    with (tmp_path / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(10) for text in speeches)
    options = [
        "--source",
        "text.jsonl",
        "--tokenizer",
        "t.model",
        "--unit-bytes",
        "300000",
        "--heldout-fraction",
        "0.1",
    ]
    succeed(tostlm("prepare", *options, "--out", "whole", cwd=tmp_path))

    def logs() -> str:
        return "\n".join(path.read_text() for path in tmp_path.glob("*.log"))

    script = str(ROOT / "slurm" / "prepare.sbatch")
    command = ["sbatch", "--parsable", "--array=0-2", "--cpus-per-task=2", script, *options, "--out", "out"]
    job = run(cluster.environment, tmp_path, *command)
    merge = ["--wrap", "tostlm prepare --merge --out out"]
    run(cluster.environment, tmp_path, "sbatch", f"--dependency=afterok:{job}", "--output=merge.log", *merge)
    wait_until(lambda: list((tmp_path / "out" / "units").glob("0*/result.json")), logs)
    run(cluster.environment, tmp_path, "scontrol", "requeue", f"{job}_1")  # kills it, and starts it again
    finished = list((tmp_path / "out" / "units").glob("0*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in finished if path.exists()}
    wait_until(lambda: (tmp_path / "out" / "manifest.json").exists(), logs)
    wait_until(lambda: not any((tmp_path / "out" / name).exists() for name in ("units", "plan.json")), logs)
    assert before
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.glob("prepare-*.log")) == [f"prepare-{job}_{n}.log" for n in range(3)]
    assert os.path.getsize(tmp_path / "merge.log")  # noqa: PTH202
