"""Weights & Biases, where a run asks for it. Once training has begun, no failure of the service ends or stops a run."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tostlm.config import RunConfig
from tostlm.errors import UserError, error_summary
from tostlm.files import write_atomically

log = logging.getLogger(__name__)
START_SECONDS, END_SECONDS = 60, 60  # that the service may keep a run waiting for


def check_wandb(config: RunConfig) -> None:
    """Find what `train.wandb_project` needs, if it is set.

    Raises:
        UserError: the library or its key is missing.
    """
    if config.train.wandb_project is None:
        return
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"train.wandb_project {config.train.wandb_project} needs Weights & Biases; pip install 'tostlm[wandb]', or "
            "leave it out"
        ) from None
    online = wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
    if online and not wandb.login(verify=False, prompt=False):
        raise UserError(
            f"train.wandb_project {config.train.wandb_project} needs a key of Weights & Biases; run `wandb login`, set "
            "WANDB_API_KEY, or write to disk alone with WANDB_MODE=offline"
        )


class WandbRun:
    """A run's scalars over there. A resumed run goes on under the same id, which its folder keeps.

    What is written there stays: after a rollback a step stands there twice.
    """

    def __init__(self, config: RunConfig, project: str) -> None:
        import wandb

        self._run: Any = None
        with self._harmless():
            self._run = wandb.init(
                project=project,
                name=config.run_dir.name,
                id=_id_of(config.run_dir),
                resume="allow",
                dir=config.run_dir,
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(
                    silent=True, console="off", init_timeout=START_SECONDS, finish_timeout=END_SECONDS
                ),
            )
            self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Send scalars by name."""
        if self._run is not None:
            with self._harmless():
                self._run.log({"step": step, **scalars})

    def close(self, failed: bool) -> None:
        """Send what is left."""
        if self._run is not None:
            with self._harmless():
                self._run.finish(exit_code=int(failed))

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever its service, its network or its own processes do
            self._run = None
            log.warning("the run goes on without Weights & Biases: %s", error_summary(error))


def _id_of(run_dir: Path) -> str:
    path = run_dir / "wandb" / "id"
    if not path.exists():
        write_atomically(path, secrets.token_hex(8))
    return path.read_text()
