"""Training steps on data of chance, and the most memory that a process takes for them."""

import ctypes
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from tostlm.config import RunConfig, batch_plan
from tostlm.launch import RankInfo
from tostlm.train.batches import Batch, RecurrentState
from tostlm.train.engine import start_engine, train_step

M_MMAP_THRESHOLD = -3  # of mallopt


def steps(config: RunConfig, rank: int, world_size: int) -> Callable[[], None]:
    """Start an engine, and return what makes it take a step."""
    plan = batch_plan(config, world_size)
    engine = start_engine(config, plan, RankInfo(rank, rank, world_size))
    tokens = torch.randint(config.model.vocab_size, (plan.micro_sequences, config.data.context_tokens + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None)
    state = RecurrentState(config, plan.accumulation, RankInfo(rank, rank, world_size))

    def step() -> None:
        micro_batches = [batch] * plan.accumulation
        train_step(engine, micro_batches, 1e-3, lambda loss: False, False, state, lambda name: nullcontext())

    return step


def peak_bytes(config: RunConfig, small: RunConfig, rank: int, world_size: int) -> int:
    """The most memory that this process takes in two steps of a run, beyond what it has after one of a `small` one.

    Large tensors get pages of their own, which return to the system with them. By default glibc keeps some of those.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 17)
    steps(small, rank, world_size)()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # lets VmHWM begin again
    step = steps(config, rank, world_size)
    step()
    step()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))
