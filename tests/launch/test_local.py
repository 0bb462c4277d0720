"""The local launcher with scripts as ranks: signals are forwarded to the ranks, their exit codes become one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE
from tostlm.launch import run_local

pytestmark = pytest.mark.timed

LAUNCHER = """
import sys
from tostlm.launch import run_local

sys.executable = sys.argv[1]
sys.exit(run_local([], 2))
"""
STUCK = "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
KILLED = "time.sleep(0.5); os.kill(os.getpid(), signal.SIGKILL)"
MET = """
open("here-" + os.environ["RANK"], "w")
while not (os.path.exists("here-0") and os.path.exists("here-1")):
    time.sleep(0.001)
"""
SAVES = """
def save(number, frame):
    time.sleep(3)
    open(f"saved-{os.environ['RANK']}", "w").write(str(number))
    sys.exit(75)

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, save)
"""
WRITES_ITS_PID = """
open(f"pid-{os.environ['RANK']}", "w").write(str(os.getpid()))
time.sleep(600)
"""


@pytest.fixture
def stub(tmp_path: Path) -> Callable[..., str]:
    """Make an executable that runs the rank's own of several Python snippets."""

    def make(*bodies: str) -> str:
        path = tmp_path / "stub"
        path.write_text(
            f"#!{sys.executable}\nimport os, signal, sys, time\nexec({bodies!r}[int(os.environ['RANK'])])\n"
        )
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def launched(stub: Callable[..., str], tmp_path: Path) -> Callable[[str], subprocess.Popen[bytes]]:
    """Start a launcher of two ranks and wait until both run."""

    def start(body: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", LAUNCHER, stub(*[body + WRITES_ITS_PID] * 2)]
        path = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(command, cwd=tmp_path, env={**os.environ, **path})
        deadline = time.monotonic() + 30
        while len(pids(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert len(pids(tmp_path)) == 2
        return process

    return start


def pids(folder: Path) -> list[str]:
    return [text for file in folder.glob("pid-*") if (text := file.read_text())]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_forwarded_and_the_ranks_waited_for(
    launched: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path, number: int
) -> None:
    process = launched(SAVES)
    process.send_signal(number)
    assert process.wait(timeout=30) == EXIT_REQUEUE
    assert [(tmp_path / f"saved-{rank}").read_text() for rank in (0, 1)] == [str(number)] * 2


def test_a_second_sigterm_ends_the_ranks_at_once(
    launched: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = launched(SAVES)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)  # the first SIGTERM is forwarded too
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=1.5) == 128 + signal.SIGTERM
    assert not [pid for pid in pids(tmp_path) if Path(f"/proc/{pid}").exists()]
    assert not list(tmp_path.glob("saved-*"))


def test_ranks_without_a_handler_end_with_the_requeue_code(launched: Callable[[str], subprocess.Popen[bytes]]) -> None:
    process = launched("")
    process.terminate()
    assert process.wait(timeout=10) == EXIT_REQUEUE


@pytest.mark.parametrize(
    ("bodies", "code", "stderr"),
    [
        (("", ""), 0, ""),
        (("sys.exit(75)", "time.sleep(3); sys.exit(75)"), EXIT_REQUEUE, ""),
        (("sys.exit(2)", STUCK), 2, ""),
        ((f"{MET}sys.exit(1)", f"{MET}sys.exit(2)"), 2, ""),
        (("sys.exit(76)", "sys.exit(1)"), 1, ""),
        (("sys.exit(76)", STUCK), EXIT_LOST_RANK, ""),
        (
            ("sys.exit(77)", STUCK),
            EXIT_LOST_RANK,
            "tostlm: rank 0 lost another rank while the run started; run the same command to continue\n",
        ),
        (
            (f"{MET}{KILLED}", f"{MET}time.sleep(0.5); sys.exit(77)"),
            EXIT_LOST_RANK,
            "tostlm: rank 0 was ended by signal 9; run the same command to continue\n",
        ),
        ((STUCK, KILLED), EXIT_LOST_RANK, "tostlm: rank 1 was ended by signal 9; run the same command to continue\n"),
        (("time.sleep(1.5); sys.exit(76)", KILLED), EXIT_LOST_RANK, ""),  # a rank has already named it
    ],
)
def test_the_exit_code_of_the_run(
    stub: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    bodies: tuple[str, str],
    code: int,
    stderr: str,
    tmp_path: Path,
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", stub(*bodies))
    start = time.monotonic()
    assert run_local([], 2) == code
    assert time.monotonic() - start < 10
    assert capfd.readouterr().err == stderr
    assert signal.getsignal(signal.SIGTERM) == handler
