"""Saving a run while it goes on. What a checkpoint holds is in tostlm/checkpoint.py."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint.deepspeed_state import (
    gather_state,
    loss_scale,
    optimizer_steps,
    state_keys,
    state_numels,
    whole_weights,
)
from tostlm.checkpoint.layout import (
    CARRY,
    COMPLETE,
    CONFIG,
    PROGRESS,
    STATE,
    WEIGHTS,
    TrainState,
    checkpoint_folder,
    checkpoints,
    read_train_state,
)
from tostlm.checkpoint.state_files import Checksum, Content, pack, write_file
from tostlm.config import RunConfig, dump_config
from tostlm.data import Tokenizer, read_manifest
from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.files import sync_folder, write_atomically
from tostlm.launch import RankInfo

LATEST = "latest"
PARTIAL, REMOVED = ".saving-", ".removing-"  # before a checkpoint's name: not published yet, and no longer
RANK_DONE, RANK_FAILED = ".rank-{}.json", ".rank-{}.failed"
POLL_SECONDS, WAITING_SECONDS = 0.05, 1.0


class CheckpointSaver:
    """Writes a run's checkpoints. Every rank has one, as a context, and calls its methods when the others do.

    Training stands still while tensors are copied to the host; a thread writes them, each rank's its own files, and
    rank 0's publishes the whole by a rename when it has seen that all are on disk.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, ranks: RankInfo, waiting: Callable[[], None]) -> None:
        """`waiting` is called now and then while a rank waits for a disk, which may be long and is no hang."""
        self._config, self._tokenizer, self._ranks, self._waiting = config, tokenizer, ranks, waiting
        self._thread = ThreadPoolExecutor(1, "save")
        self._under_way: tuple[Path, Future[str | None]] | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown()

    def save(self, engine: Any, progress: TrainState, carry: Mapping[str, Tensor]) -> None:
        """Save the engine and where the run is; `carry` is what it remembers of its documents.

        Raises:
            UserError: this save or the one before it cannot be written; the run's older checkpoints are untouched.
        """
        self.finish()
        folder = checkpoint_folder(self._config.run_dir, progress.step)
        self._under_way = folder, self._thread.submit(self._write, folder, self._copy(engine, progress, carry))
        if not self._config.train.save_in_background:
            self.finish()

    def finish(self) -> None:
        """Wait until what was saved last is published.

        Raises:
            UserError: it cannot be written; said by rank 0.
        """
        if self._under_way is None:
            return
        (folder, written), self._under_way = self._under_way, None
        while wait([written], WAITING_SECONDS).not_done:
            self._waiting()
        troubles: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(troubles, written.result())
        trouble = next(filter(None, reversed(troubles)), None)  # rank 0 may only know that another failed
        if trouble is None:
            return
        if self._ranks.rank:
            raise SystemExit(EXIT_USER_ERROR)
        shutil.rmtree(partial_of(folder), ignore_errors=True)
        raise UserError(
            f"checkpoint {folder} cannot be written: {trouble}; make room and run the command again, it resumes from "
            "the checkpoint before"
        )

    def _copy(self, engine: Any, progress: TrainState, carry: Mapping[str, Tensor]) -> dict[str, Content]:
        """What this rank writes, by file."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        numels = state_numels(engine)
        packed = pack({name: 4 * len(state_keys(name)) * numel for name, numel in numels.items()}, world_size)
        rank_of = {name: owner for owner, shared in enumerate(packed) for names in shared for name in names}
        tensors = gather_state(engine, rank_of)
        first = sum(len(shared) for shared in packed[:rank])  # number of this rank's first file
        files: dict[str, Content] = {
            f"{STATE}/{number:05d}.safetensors": {key: tensors[key] for name in names for key in state_keys(name)}
            for number, names in enumerate(packed[rank], start=first)
        }
        weights = whole_weights(engine) if self._config.train.save_weights else {}
        if rank:
            return files
        if weights:
            files[WEIGHTS] = weights
        if carry:
            files[CARRY] = {name: tensor.detach().to("cpu", copy=True) for name, tensor in carry.items()}
        whole = progress._replace(
            optimizer_steps=optimizer_steps(engine),
            loss_scale=loss_scale(engine),
            world_size=world_size,
            zero_stage=self._config.zero_stage,
            data_sha256=data_sha256(self._config),
        )
        files[CONFIG] = dump_config(self._config).encode()
        files[self._tokenizer.file_name] = self._tokenizer.content
        files[PROGRESS] = f"{json.dumps(whole._asdict())}\n".encode()
        return files

    def _write(self, folder: Path, files: Mapping[str, Content]) -> str | None:
        """Write this rank's files; on rank 0 publish all ranks'. Returns what went wrong."""
        partial, rank = partial_of(folder), self._ranks.rank
        try:
            (partial / STATE).mkdir(parents=True, exist_ok=True)
            sums = {name: write_file(partial / name, content) for name, content in files.items()}
            write_atomically(partial / RANK_DONE.format(rank), json.dumps(sums))
            if rank == 0:
                publish(partial, folder, self._sums_of_all_ranks(partial))
                for old in to_remove(self._config, checkpoints(self._config.run_dir)):
                    remove(old)
        except OSError as error:
            for name in files:  # a full disk has room for the mark below again
                with suppress(OSError):
                    (partial / name).unlink()
            with suppress(OSError):  # rank 0 then waits in vain
                (partial / RANK_FAILED.format(rank)).touch()
            return error.strerror
        return None

    def _sums_of_all_ranks(self, partial: Path) -> dict[str, Checksum]:
        sums: dict[str, Checksum] = {}
        deadline = time.monotonic() + self._config.train.hang_timeout_seconds
        for rank in range(self._ranks.world_size):
            done = partial / RANK_DONE.format(rank)
            while not done.exists():
                if any(partial.glob(RANK_FAILED.format("*"))) or time.monotonic() > deadline:
                    raise OSError(errno.EIO, f"rank {rank} did not write its part")
                time.sleep(POLL_SECONDS)
            sums |= json.loads(done.read_text())
        return sums


def publish(partial: Path, folder: Path, sums: Mapping[str, Checksum]) -> None:
    """Make a checkpoint of what lies in `partial`: a reader finds it whole or not at all, after a crash too.

    Raises:
        OSError: it cannot be written.
    """
    for done in partial.glob(".rank-*"):
        done.unlink()
    write_file(partial / COMPLETE, f"{json.dumps(sums, indent=1)}\n".encode())
    sync_folder(partial / STATE)
    sync_folder(partial)
    if folder.exists():  # a run that went back has come here again
        remove(folder)
    partial.replace(folder)
    sync_folder(folder.parent)
    write_atomically(folder.parent / LATEST, f"{folder.name}\n")


def to_remove(config: RunConfig, found: Sequence[Path]) -> list[Path]:
    """The checkpoints, of those `found` oldest first, that the config does not say to keep."""
    train = config.train
    if train.keep_last_checkpoints is None:
        return []
    kept = set(found[-train.keep_last_checkpoints :])
    progress = {folder: read_train_state(folder) for folder in found}
    if train.keep_every_steps:
        kept |= {folder for folder in found if progress[folder].step % train.keep_every_steps == 0}
    losses = {folder: loss for folder in found if (loss := progress[folder].validation_loss) is not None}
    if train.keep_best_checkpoint and losses:
        kept.add(min(losses, key=lambda folder: losses[folder]))  # of equals the oldest, nearest to its evaluation
    return [folder for folder in found if folder not in kept]


def remove(folder: Path) -> None:
    """Delete a checkpoint, which is none from the first moment on.

    Raises:
        OSError: it cannot be deleted.
    """
    hidden = folder.with_name(f"{REMOVED}{folder.name}")
    folder.rename(hidden)
    shutil.rmtree(hidden)


def clear_unfinished(run_dir: Path) -> None:
    """Remove what a save or a deletion that did not end has left."""
    for start in (PARTIAL, REMOVED, f".{LATEST}.partial-"):
        for leftover in (run_dir / "checkpoints").glob(f"{start}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def partial_of(folder: Path) -> Path:
    """Where a checkpoint's files are before it is published."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


def data_sha256(config: RunConfig) -> str:
    """What tells the data of a run from others: a hash of what its prepared folders hold."""
    contents = [read_manifest(folder).content_sha256 for folder in config.data.folders]
    return hashlib.sha256("".join(contents).encode()).hexdigest()
