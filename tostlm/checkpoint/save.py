"""Saving checkpoints while training continues; `tostlm/checkpoint/layout.py` has what they hold."""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch.distributed as dist
from torch import Tensor

from tostlm.checkpoint.deepspeed_state import (
    DeepSpeedEngine,
    gather_state,
    gather_weights,
    loss_scale,
    optimizer_steps,
    state_keys,
    state_numels,
)
from tostlm.checkpoint.folders import partial_folder, prune, publish
from tostlm.checkpoint.integrity import CONFIG, TRAIN_STATE, Checksum
from tostlm.checkpoint.layout import (
    RECURRENT_STATE,
    STATE,
    WEIGHTS,
    TrainState,
    checkpoint_folder,
    data_sha256,
)
from tostlm.checkpoint.rollback import settle_rollback
from tostlm.checkpoint.state_files import Content, assign_files, write_file
from tostlm.config import RunConfig, dump_config
from tostlm.data import ShardStates, Tokenizer
from tostlm.errors import EXIT_USER_ERROR, UserError
from tostlm.files import write_atomically
from tostlm.launch import RankInfo

RANK_DONE, RANK_FAILED = ".rank-{}.json", ".rank-{}.failed"
POLL_SECONDS, WAIT_SECONDS = 0.05, 1.0


class CheckpointSaver:
    """Writes the checkpoints of a run. Every rank has one, as a context, and calls its methods when the others do.

    Training waits while tensors are copied to the host. Then a thread of each rank writes the rank's own files, and
    rank 0's publishes the checkpoint by a rename once all ranks' files are on disk.

    Args:
        on_wait: called every second while a rank waits for files, with whether any were written on since the last call:
            a slow disk is no hang.
    """

    def __init__(
        self, config: RunConfig, tokenizer: Tokenizer, ranks: RankInfo, on_wait: Callable[[bool], None]
    ) -> None:
        self._config, self._tokenizer, self._ranks, self._on_wait = config, tokenizer, ranks, on_wait
        self._data_sha256 = "" if ranks.rank else data_sha256(config)
        self._shards = ShardStates([] if ranks.rank else config.data.folders)
        self._progress = threading.Event()  # something was written since the last look
        self._thread = ThreadPoolExecutor(1, "save")
        self._pending: tuple[Path, Future[str | None]] | None = None

    def __enter__(self) -> CheckpointSaver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._thread.shutdown(wait=kind is None)  # after an error the thread may wait for a rank that is gone

    def save(self, engine: DeepSpeedEngine, train_state: TrainState, recurrent_state: Mapping[str, Tensor]) -> None:
        """Save a checkpoint, in the background unless `train.save_in_background` is off.

        Args:
            recurrent_state: tensors on the host, which must not change later; rank 0 saves its own.

        Raises:
            UserError: on rank 0, if this checkpoint or the one before cannot be written; older ones are intact. The
                other ranks raise SystemExit with `EXIT_USER_ERROR`.
        """
        self.finish()
        folder = checkpoint_folder(self._config.run_dir, train_state.step)
        files = self._copy_to_host(engine, train_state, recurrent_state)
        self._pending = folder, self._thread.submit(self._write, folder, files)
        if not self._config.train.save_in_background:
            self.finish()

    def finish(self) -> None:
        """Wait until the last checkpoint is published.

        Raises:
            UserError: on rank 0, if it cannot be written; see `save`.
        """
        if self._pending is None:
            return
        (folder, written), self._pending = self._pending, None
        while wait([written], WAIT_SECONDS).not_done:
            progress = self._progress.is_set()
            self._progress.clear()
            self._on_wait(progress)
        errors: list[str | None] = [None] * self._ranks.world_size
        dist.all_gather_object(errors, written.result())
        error = next(filter(None, reversed(errors)), None)  # rank 0 may only know that another rank failed
        if error is None:
            return
        if self._ranks.rank:
            raise SystemExit(EXIT_USER_ERROR)
        shutil.rmtree(partial_folder(folder), ignore_errors=True)
        raise UserError(f"checkpoint {folder} cannot be written: {error}")

    def _copy_to_host(
        self, engine: DeepSpeedEngine, train_state: TrainState, recurrent_state: Mapping[str, Tensor]
    ) -> dict[str, Content]:
        """Return the contents of the files that this rank writes, by path in the checkpoint."""
        rank, world_size = self._ranks.rank, self._ranks.world_size
        sizes = {name: 4 * len(state_keys(engine, name)) * numel for name, numel in state_numels(engine).items()}
        assigned = assign_files(sizes, world_size)
        rank_of = {name: owner for owner, files_of in enumerate(assigned) for names in files_of for name in names}
        tensors = gather_state(engine, rank_of)
        files: dict[str, Content] = {
            f"{STATE}/{number:05d}.safetensors": {
                key: tensors[key] for name in names for key in state_keys(engine, name)
            }
            for number, names in enumerate(assigned[rank], start=sum(map(len, assigned[:rank])))
        }
        weights = gather_weights(engine) if self._config.train.save_weights else {}
        if rank:
            return files
        if weights:
            files[WEIGHTS] = weights
        if recurrent_state:
            files[RECURRENT_STATE] = recurrent_state
        train_state = train_state._replace(
            optimizer_steps=optimizer_steps(engine),
            loss_scale=loss_scale(engine),
            world_size=world_size,
            zero_stage=self._config.zero_stage,
            data_sha256=self._data_sha256,
            ema_updates=None if engine.weight_average is None else engine.weight_average.updates,
        )
        files[CONFIG] = dump_config(self._config).encode()
        files[self._tokenizer.file_name] = self._tokenizer.content
        files[TRAIN_STATE] = train_state.to_json().encode()
        return files

    def _write(self, folder: Path, files: Mapping[str, Content]) -> str | None:
        """Write this rank's files, and publish all ranks' on rank 0. Returns the error, if any."""
        partial, rank = partial_folder(folder), self._ranks.rank
        try:
            (partial / STATE).mkdir(parents=True, exist_ok=True)
            checksums = {
                name: write_file(partial / name, content, self._progress.set) for name, content in files.items()
            }
            write_atomically(partial / RANK_DONE.format(rank), json.dumps(checksums), durable=False)
            if rank == 0:
                if self._data_changed():
                    folders = ", ".join(map(str, self._config.data.folders))
                    return f"the data in {folders} changed since training started; put it back, or train it elsewhere"
                publish(partial, folder, self._gather_checksums(partial))
                settle_rollback(self._config.run_dir, folder)
                prune(self._config)
        except UserError as error:
            return str(error)
        except OSError as error:
            for name in files:  # makes room for the mark below on a full disk
                with suppress(OSError):
                    (partial / name).unlink()
            with suppress(OSError):  # without the mark, rank 0 waits until its deadline
                (partial / RANK_FAILED.format(rank)).touch()
            return f"{error.strerror}; make room and run the command again, it resumes from the checkpoint before"
        return None

    def _data_changed(self) -> bool:
        try:
            self._shards.verify_changed()
            return data_sha256(self._config) != self._data_sha256
        except UserError:
            return True

    def _gather_checksums(self, partial: Path) -> dict[str, Checksum]:
        """Wait until all ranks have written their files, and return the checksums of these."""
        checksums: dict[str, Checksum] = {}
        last_progress, size = time.monotonic(), 0
        for rank in range(self._ranks.world_size):
            done = partial / RANK_DONE.format(rank)
            while not done.exists():
                written = sum(path.stat().st_size for path in (partial / STATE).iterdir())
                if written != size:
                    last_progress, size = time.monotonic(), written
                    self._progress.set()
                late = time.monotonic() - last_progress > self._config.train.hang_timeout_seconds
                if any(partial.glob(RANK_FAILED.format("*"))) or late:
                    raise OSError(errno.EIO, f"rank {rank} did not write its part")
                time.sleep(POLL_SECONDS)
            checksums |= json.loads(done.read_text())
        return checksums
