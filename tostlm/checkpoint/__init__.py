"""Checkpoints: what they hold, saving and loading them."""

from tostlm.checkpoint.integrity import COMPLETE, CONFIG
from tostlm.checkpoint.layout import (
    Checkpoint,
    TrainState,
    checkpoint_folder,
    checkpoints,
    load_checkpoint,
    read_train_state,
    resolve,
    run_folder,
    step_of,
)

__all__ = [
    "COMPLETE",
    "CONFIG",
    "Checkpoint",
    "TrainState",
    "checkpoint_folder",
    "checkpoints",
    "load_checkpoint",
    "read_train_state",
    "resolve",
    "run_folder",
    "step_of",
]
