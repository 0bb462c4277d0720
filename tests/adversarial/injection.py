"""Faults that strike a run from within one of its ranks, each at a moment that is named instead of timed."""

import os
import resource
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from tests.train.test_faults import high_loss, nan_loss
from tostlm.checkpoint import checkpoint_folder
from tostlm.checkpoint.integrity import COMPLETE
from tostlm.checkpoint.rollback import RECORD
from tostlm.train import trainer, watchdog
from tostlm.train.batches import RankBatches
from tostlm.train.engine import StepResult
from tostlm.train.watchdog import Watchdog


class Moment(NamedTuple):
    """When a fault strikes: a call of the trainer's, a phase of a step, or an operation of the thread that saves."""

    kind: str  # before, after, phase, save, saved, rolled back
    name: str = ""  # of the function or the phase
    number: int = 0  # of finished steps, of the saving thread's operations, or of the checkpoint's step


class Fault(NamedTuple):
    what: str
    moment: Moment
    rank: int
    size: int = 0  # bytes, where a disk is full


class Harm(NamedTuple):
    """All that goes wrong in one start of a run."""

    faults: Sequence[Fault]
    trouble: str  # with the numbers, see TROUBLES
    run_dir: Path
    data: Path  # a prepared folder of its own, if a fault harms it
    other_data: Path
    marks: Path  # folder: each fault that strikes leaves a file with the ids of all ranks
    clock_seconds: float

    def inflict(self) -> None:
        """Arm this launcher, of which the ranks will be forked."""
        now = time.time
        time.time = lambda: now() + self.clock_seconds
        watchdog.START_SECONDS = 0.0  # the first step is watched like any other
        spoil(*TROUBLES[self.trouble])
        for number, fault in enumerate(self.faults):
            ARM[fault.moment.kind](fault.moment, partial(self.strike, fault, self.marks / str(number)), self)

    def strike(self, fault: Fault, mark: Path) -> None:
        if mark.exists() or os.environ.get("RANK") != str(fault.rank):
            return
        mark.write_text(" ".join(map(str, ranks())))
        FAULTS[fault.what](self, fault)


def ranks() -> list[int]:
    """Return the ids of the processes that this one's launcher has started, this one's last."""
    launcher, own = os.getppid(), os.getpid()
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [*(int(child) for child in children if int(child) != own), own]


def send(number: int, *processes: int) -> None:
    for process in processes:
        os.kill(process, number)


def fill_disk(harm: Harm, fault: Fault) -> None:
    room = os.statvfs(harm.run_dir.parent)
    with (harm.run_dir.parent / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, room.f_bavail * room.f_frsize - fault.size))


def replace_data(harm: Harm, fault: Fault) -> None:
    shutil.copytree(harm.other_data, harm.data, dirs_exist_ok=True)


FAULTS: dict[str, Callable[[Harm, Fault], object]] = {
    "SIGKILL of a rank": lambda harm, fault: send(signal.SIGKILL, os.getpid()),
    "SIGKILL of all ranks": lambda harm, fault: send(signal.SIGKILL, *ranks()),
    "SIGKILL of the launcher": lambda harm, fault: send(signal.SIGKILL, os.getppid()),
    "SIGTERM": lambda harm, fault: send(signal.SIGTERM, os.getppid()),
    "SIGUSR1 to all ranks": lambda harm, fault: send(signal.SIGUSR1, *ranks()),
    "SIGTERM to a rank": lambda harm, fault: send(signal.SIGTERM, os.getpid()),
    "SIGTERM twice": lambda harm, fault: send(signal.SIGTERM, os.getppid(), os.getppid()),
    "SIGHUP": lambda harm, fault: send(signal.SIGHUP, os.getppid()),
    "Ctrl-C": lambda harm, fault: os.killpg(0, signal.SIGINT),
    "SIGSTOP of a rank": lambda harm, fault: send(signal.SIGSTOP, os.getpid()),
    "a rank stuck": lambda harm, fault: time.sleep(3600),
    "full disk": fill_disk,
    "limit of file sizes": lambda harm, fault: resource.setrlimit(
        resource.RLIMIT_FSIZE, (fault.size, resource.RLIM_INFINITY)
    ),
    "data removed": lambda harm, fault: shutil.rmtree(harm.data),
    "data replaced": replace_data,
}


def wrap(owner: Any, name: str, before: Callable[..., object], after: Callable[..., object]) -> None:
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **options: Any) -> Any:
        before(*arguments)
        result = function(*arguments, **options)
        after(*arguments)
        return result

    setattr(owner, name, wrapped)


def nothing(*_: object) -> None:
    pass


def arm_call(moment: Moment, strike: Callable[[], None], harm: Harm) -> None:
    around = [lambda *_: strike(), nothing]
    wrap(trainer, moment.name, *(around if moment.kind == "before" else reversed(around)))


def arm_phase(moment: Moment, strike: Callable[[], None], harm: Harm) -> None:
    def reached(watchdog: Watchdog, step: int, phase: str) -> None:
        if (step, phase) == (moment.number, moment.name):
            strike()

    wrap(Watchdog, "record_phase", nothing, reached)


def arm_file(moment: Moment, strike: Callable[[], None], harm: Harm) -> None:
    """As soon as a step is saved, or a rollback recorded."""
    saved = moment.kind == "saved"
    file = checkpoint_folder(harm.run_dir, moment.number) / COMPLETE if saved else harm.run_dir / "checkpoints" / RECORD
    wrap(Watchdog, "record_phase", nothing, lambda *_: strike() if file.exists() else None)


def arm_save(moment: Moment, strike: Callable[[], None], harm: Harm) -> None:
    """Before one of the operations by which the thread that saves makes files durable and publishes them."""
    operations = count()

    def reached(*_: object) -> None:
        if threading.current_thread().name.startswith("save") and next(operations) == moment.number:
            strike()

    for name in ("fsync", "replace", "rename"):
        wrap(os, name, reached, nothing)


ARM: dict[str, Callable[[Moment, Callable[[], None], Harm], None]] = {
    "before": arm_call,
    "after": arm_call,
    "phase": arm_phase,
    "save": arm_save,
    "saved": arm_file,
    "rolled back": arm_file,
}

# Steps of the data that go wrong, and how: spikes on every rank, other trouble on the last. They go wrong in every
# start, so that a run that is interrupted meets them as one that is not.
TROUBLES: dict[str, tuple[range, Callable[[Any], Any]]] = {
    "none": (range(0), nan_loss),
    "a NaN": (range(4, 5), nan_loss),
    "a spike": (range(7, 8), high_loss),
    "a rollback": (range(6, 8), nan_loss),
}


def spoil(data_steps: range, fault: Callable[[Any], Any]) -> None:
    training, train_step, read = RankBatches.training, trainer.train_step, [0]

    def counted(self: RankBatches, first_step: int) -> Generator[Any]:
        for data_step, batch in enumerate(training(self, first_step), first_step):
            read[0] = data_step
            yield batch

    def faulty(engine: Any, *arguments: Any) -> StepResult:
        here = fault is high_loss or int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
        hook = fault(engine) if here and read[0] in data_steps else None
        result = train_step(engine, *arguments)
        if hook is not None:
            hook.remove()
        return result

    RankBatches.training, trainer.train_step = counted, faulty
