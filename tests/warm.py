"""The command line, forked from a process that has imported everything: imports are most of a short run's time."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

import tostlm.launch.local
from tostlm.main import main

# DeepSpeed imports its Muon, and with it torch.compile's backend, when an engine starts.
MUON = "deepspeed.runtime.zero.muon.original_muon"
IMPORTED = ["tostlm.train", "tostlm.eval", "tostlm.convert", "tostlm.bench", "torch.utils.tensorboard", MUON]
TIMEOUT_SECONDS = 300

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__, *IMPORTED])


class Program:
    """`python -m tostlm ARGUMENTS` on one thread, under way in a session of its own; `before` runs in it first."""

    under_way: ClassVar[list["Program"]] = []  # or over, since the last time that they were ended

    def __init__(
        self, *arguments: str, cwd: Path | None = None, before: Callable[[], object] | None = None, **environment: str
    ) -> None:
        self.arguments = arguments
        folder = tempfile.mkdtemp()
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._files = Path(folder, "out"), Path(folder, "err")
        for file in self._files:
            file.touch()
        everything = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = processes.Process(target=_child, args=(arguments, cwd, before, everything, self._files))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.under_way.append(self)

    @property
    def stdout(self) -> str:
        return self._files[0].read_text()

    def running(self) -> bool:
        return self._process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def children(self) -> list[int]:
        return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]

    def end(self, seconds: float = TIMEOUT_SECONDS) -> subprocess.CompletedProcess[str]:
        """What it ended with, and all that it said; one that is not done within `seconds` is killed."""
        self._process.join(seconds)
        late = self._process.exitcode is None
        if late:
            self._process.kill()
            self._process.join()
        said = [file.read_text() for file in self._files]
        done = subprocess.CompletedProcess(self.arguments, self._process.exitcode or 0, *said)
        assert not late, f"{self.arguments} ran for {seconds} seconds\n{done.stdout}{done.stderr}"
        return done


def end_all() -> None:
    """End what a test has left behind."""
    while Program.under_way:
        program = Program.under_way.pop()
        if program.running():
            program.send_signal(signal.SIGKILL)
            program.end()


class Rank(subprocess.Popen[bytes]):
    """One of the launcher's, forked too."""

    def _execute_child(self, args: Sequence[str], executable: object, preexec_fn: Any, *rest: Any) -> None:
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            preexec_fn()
            _main(args[3:], rest[3])


def _child(
    arguments: Sequence[str],
    cwd: Path | None,
    before: Callable[[], object] | None,
    environment: Mapping[str, str],
    files: tuple[Path, Path],
) -> None:
    os.setsid()
    tostlm.launch.local.end_with_parent(signal.SIGKILL)  # the server, which ends with pytest
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    tostlm.launch.local.Popen = Rank
    torch.set_num_threads(1)
    for stream, path in enumerate((Path(os.devnull), *files)):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), stream)
    if cwd is not None:
        os.chdir(cwd)
    if before is not None:
        before()
    _main(arguments, environment)


def _main(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["tostlm", *arguments]
    main()
