"""An installed wheel works outside of the repository: shipped configs, training and the quickstart."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

SOURCES = ("tostlm", "configs", "slurm", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def tostlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The `tostlm` command of an environment with the wheel and the requirements of the tests' environment."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for name in SOURCES:
        source, copy = ROOT / name, folder / "source" / name
        if source.is_dir():
            shutil.copytree(source, copy, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    wheel = [sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", str(folder), str(folder / "source")]
    subprocess.run(wheel, check=True, env=environment)
    shutil.rmtree(folder / "source")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "requirements.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (built,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "venv" / "bin" / "python"), "install", *offline]
    subprocess.run([*install, "--force-reinstall", "--no-compile", str(built)], check=True, env=environment)
    yield folder / "venv" / "bin" / "tostlm"


def run(tostlm: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    command = [str(tostlm), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)


def succeed(tostlm: Path, folder: Path, *arguments: str) -> str:
    result = run(tostlm, folder, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_is_what_runs(tostlm: Path, tmp_path: Path) -> None:
    command = [str(tostlm.with_name("python")), "-c", "import tostlm; print(tostlm.__file__)"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(str(tostlm.parent.parent))


def test_shipped_files_are_in_the_wheel(tostlm: Path, tmp_path: Path) -> None:
    listed = succeed(tostlm, tmp_path, "config", "list").splitlines()
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert "run_dir: runs/tost-base" in succeed(tostlm, tmp_path, "config", "show", "tost-base")
    assert succeed(tostlm, tmp_path, "submit", "site-template") == (ROOT / "slurm" / "site.env").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_shipped_config_trains(tostlm: Path, tmp_path: Path, data: Path) -> None:
    small = [
        "model.depth=1",
        "model.width=32",
        "model.heads=2",
        "data.context_tokens=64",
        "train.micro_batch_tokens=512",
    ]
    short = [
        "train.steps=2",
        "optimizer.warmup_steps=1",
        "train.batch_tokens=512",
        "train.eval_tokens=512",
        "train.save_every_steps=2",
    ]
    printed = succeed(tostlm, tmp_path, "train", "quickstart", f"data.path={data}", *small, *short)
    assert "step 2/2" in printed
    assert (tmp_path / "runs" / "quickstart" / "tost" / "config.yaml").exists()


@pytest.mark.slow
def test_the_quickstart_runs_in_an_empty_folder(tostlm: Path, tmp_path: Path) -> None:
    succeed(tostlm, tmp_path, "quickstart")
    assert (tmp_path / "runs" / "quickstart" / "sample.txt").exists()
