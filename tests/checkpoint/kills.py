"""Saves that are killed: at every durable operation of a save in turn, and two saving ranks at random moments.

The state of each step is a function of the step, so that a mixture of two checkpoints is recognized.
"""

import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tostlm.checkpoint import state_files
from tostlm.checkpoint.deepspeed_state import ADAM_KINDS, gather_state, restore_state, state_elements, state_numels
from tostlm.checkpoint.folders import LATEST, PARTIAL
from tostlm.checkpoint.layout import TrainState, checkpoint_folder, checkpoints, read_state, read_train_state
from tostlm.checkpoint.load import latest_valid_checkpoint, resume
from tostlm.checkpoint.save import CheckpointSaver
from tostlm.config import RunConfig, batch_plan, load_config
from tostlm.data import common_tokenizer
from tostlm.launch import RankInfo, rank_from_environment
from tostlm.launch.local import rank_env
from tostlm.model import LM
from tostlm.train.engine import TrainingEngine, init_distributed, start_engine

WORLD_SIZE = 2
LONGEST_SECONDS = 0.1  # from the start of a save to a kill at random
STEP_BYTES = 1 << 17  # of a file in state/, so that a save writes several

Expected = dict[str, Tensor]


def expected_state(config: RunConfig, step: int) -> Expected:
    """Return the state that the checkpoint of a step must hold."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LM(config.model).named_parameters()}
    return {
        f"{name}/{kind}": torch.full(shape, step + number / 64 + ADAM_KINDS.index(kind) / 4)
        for number, (name, shape) in enumerate(shapes.items())
        for kind in ADAM_KINDS
    }


def set_state(engine: TrainingEngine, expected: Expected, step: int) -> None:
    elements = state_elements(engine)
    parts = ((key, full.flatten()[elements[key].start : elements[key].stop]) for key, full in expected.items())
    restore_state(engine, parts, step)


def create_engine(config: RunConfig, ranks: RankInfo) -> TrainingEngine:
    return start_engine(config, batch_plan(config, ranks.world_size), ranks)


def create_saver(config: RunConfig, ranks: RankInfo) -> CheckpointSaver:
    return CheckpointSaver(config, common_tokenizer(config.data.folders), ranks, lambda progress: None)


def check_newest(config: RunConfig) -> int:
    """Check that every published checkpoint is undamaged and the newest holds its step's state; return this step."""
    published = checkpoints(config.run_dir)
    latest = config.run_dir / "checkpoints" / (config.run_dir / "checkpoints" / LATEST).read_text().strip()
    assert latest in published, f"{LATEST} names {latest}, which is no checkpoint"
    newest = latest_valid_checkpoint(config)
    assert newest == published[-1], f"{published[-1]} was published damaged"
    step = read_train_state(newest).step
    expected = expected_state(config, step)
    for key, tensor in read_state(newest, {key: range(full.numel()) for key, full in expected.items()}):
        assert tensor.equal(expected[key].flatten()), (newest, key)
    return step


class DurableOperations:
    """Names the operations by which a save becomes durable, and kills the process before or after one of them.

    Args:
        folder: the folder of checkpoints, to which paths in names are relative.
        kill: "before NAME" or "after NAME"; None to record the names alone.
    """

    def __init__(self, folder: Path, kill: str | None) -> None:
        self.names: list[str] = []
        self._folder, self._kill = folder, kill
        for module, operation in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (shutil, "rmtree")):
            setattr(module, operation, self._wrap(operation, getattr(module, operation)))

    def _wrap(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: int | str | Path, *arguments: Any, **options: Any) -> Any:
            if operation == "unlink" and "dir_fd" not in options:  # not in rmtree
                return function(target, *arguments, **options)
            name = f"{operation} {self._relative(target, options)}"
            self.names.append(name)
            self._reached(f"before {name}")
            result = function(target, *arguments, **options)
            self._reached(f"after {name}")
            return result

        return wrapped

    def _relative(self, target: int | str | Path, options: Mapping[str, Any]) -> str:
        if "dir_fd" in options:
            return "a file of a removed checkpoint"
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
        return re.sub(r"(partial|rank|step)-\w+", r"\1-N", str(path.relative_to(self._folder)))

    def _reached(self, point: str) -> None:
        if point == self._kill:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_every_point(file: str, rank: int, world_size: int) -> dict[str, int]:
    """Kill a save of step 2, which also removes step 1, at each of its points; return the newest step after each.

    A child process is forked for each save. It has no collectives, which one rank at ZeRO stage 0 does not need.
    """
    config, ranks = load_config(Path(file)), RankInfo(rank, rank, world_size)
    state_files.FILE_BYTES = STEP_BYTES
    engine, folder = create_engine(config, ranks), config.run_dir / "checkpoints"
    set_state(engine, expected_state(config, 1), 1)
    with create_saver(config, ranks) as saver:
        saver.save(engine, TrainState(step=1), {})
    first = folder.rename(folder.with_name("first"))

    def save(kill: str | None) -> list[str]:
        """Save step 2 beside a copy of step 1, and return the names of the operations if it is not killed."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(first, folder)
        names = config.run_dir / "names.json"
        set_state(engine, expected_state(config, 2), 2)
        child = os.fork()
        if child == 0:
            operations = DurableOperations(folder, kill)
            with suppress(InterruptedError), create_saver(config, ranks) as saver:
                saver.save(engine, TrainState(step=2), {})
                saver._thread.shutdown()  # wait until all is written
                raise InterruptedError  # the saver then calls no collective
            names.write_text(json.dumps(operations.names))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == (0 if kill is None else -signal.SIGKILL), kill
        return json.loads(names.read_text()) if kill is None else []

    newest = {}
    for name in dict.fromkeys(save(None)):
        for point in (f"before {name}", f"after {name}"):
            save(point)
            step = newest[point] = check_newest(config)
            assert resume(engine, config, checkpoint_folder(config.run_dir, step)).step == step
            resumed, expected = (
                gather_state(engine, dict.fromkeys(state_numels(engine), 0)),
                expected_state(config, step),
            )
            assert all(resumed[key].equal(expected[key]) for key in expected), point
    return newest


def save_for_ever(config: RunConfig, ranks: RankInfo, start: int) -> None:
    init_distributed(ranks)
    engine = create_engine(config, ranks)
    if start:
        assert resume(engine, config, checkpoint_folder(config.run_dir, start)).step == start
    with create_saver(config, ranks) as saver:
        for step in range(start + 1, sys.maxsize):
            set_state(engine, expected_state(config, step), step)
            saver.save(engine, TrainState(step=step), {})


def start_ranks(config: RunConfig, start: int) -> list[int]:
    """Fork the ranks, which spares them the imports, into one process group; return their process ids."""
    ranks: list[int] = []
    for environment in rank_env(WORLD_SIZE):
        process = os.fork()
        if process == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            os.environ.update(environment)
            own = rank_from_environment(environment)
            assert own is not None
            save_for_ever(config, own, start)
        ranks.append(process)
        os.setpgid(process, ranks[0])
    return ranks


def kill_at_random(file: Path, kills: int) -> None:
    """Kill ranks that save all the time, resume, and again; each time check the newest checkpoint."""
    config, start = load_config(file), 0
    folder = config.run_dir / "checkpoints"
    for kill in range(kills):
        ranks = start_ranks(config, start)
        while not checkpoints(config.run_dir)[-1:] > [checkpoint_folder(config.run_dir, start)]:
            assert os.waitpid(-1, os.WNOHANG) == (0, 0), "a rank ended by itself"
            time.sleep(0.01)
        while not any(folder.glob(f"{PARTIAL}*")):
            time.sleep(0.001)
        time.sleep(random.Random(kill).uniform(0, LONGEST_SECONDS))
        os.killpg(ranks[0], signal.SIGKILL)
        for rank in ranks:
            os.waitpid(rank, 0)
        before, start = start, check_newest(config)
        assert start > before


if __name__ == "__main__":
    kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))
