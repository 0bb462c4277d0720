"""Two ranks with a real engine that save all the time, killed again and again; each time the newest checkpoint is read.

The engine's tensors hold numbers that follow from the step, so that a mixture of two saves would show.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tostlm.checkpoint.deepspeed_state import KINDS, restore_state
from tostlm.checkpoint.layout import TrainState, checkpoint_folder, checkpoints, read_state, read_train_state
from tostlm.checkpoint.load import latest_valid_checkpoint, resume
from tostlm.checkpoint.save import PARTIAL, REMOVED, CheckpointSaver
from tostlm.config import RunConfig, batch_plan, load_config
from tostlm.data import common_tokenizer
from tostlm.launch import RankInfo, rank_from_environment
from tostlm.launch.local import rank_env
from tostlm.model import LM, create_lm
from tostlm.train.engine import init_distributed, start_engine

WORLD = 2
LONGEST_SECONDS = 0.1  # from the beginning of a save to the kill


def expected(config: RunConfig, step: int) -> Iterator[tuple[str, Tensor]]:
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in LM(config.model).named_parameters()}
    for number, (name, shape) in enumerate(shapes.items()):
        for kind in KINDS:
            yield f"{name}/{kind}", torch.full(shape, step + number / 64 + KINDS.index(kind) / 4)


def save_for_ever(config: RunConfig, ranks: RankInfo, start: int) -> None:
    init_distributed(ranks)
    plan = batch_plan(config, ranks.world_size)
    engine: Any = start_engine(config, create_lm(config.model, config.seed), plan, ranks)
    if start:
        assert resume(engine, checkpoint_folder(config.run_dir, start)).step == start
    with CheckpointSaver(config, common_tokenizer(config.data.folders), ranks, lambda: None) as saver:
        for step in range(start + 1, sys.maxsize):
            restore_state(engine, expected(config, step), step)
            saver.save(engine, TrainState(step=step), {})


def start_ranks(config: RunConfig, start: int) -> list[int]:
    """Fork the ranks, which spares them the imports, into one process group; returns their process ids."""
    ranks: list[int] = []
    for place in rank_env(WORLD):
        process = os.fork()
        if process == 0:
            os.setpgid(0, ranks[0] if ranks else 0)
            os.environ.update(place)
            own = rank_from_environment(place)
            assert own is not None
            save_for_ever(config, own, start)
        ranks.append(process)
        os.setpgid(process, ranks[0])
    return ranks


def main(file: Path, kills: int) -> None:
    config, found = load_config(file), {"interrupted": 0, "removed": 0, "steps": 0}
    folder, start = config.run_dir / "checkpoints", 0
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

        for counted, kind in (("interrupted", PARTIAL), ("removed", REMOVED)):
            found[counted] += any(folder.glob(f"{kind}*"))
        newest = latest_valid_checkpoint(config)
        assert newest is not None
        assert newest == checkpoints(config.run_dir)[-1], "a checkpoint that was published is not whole"
        start = read_train_state(newest).step
        expectation = dict(expected(config, start))
        for key, tensor in read_state(newest, expectation):
            assert tensor.equal(expectation[key]), (newest, key)
    found["steps"] = start
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
