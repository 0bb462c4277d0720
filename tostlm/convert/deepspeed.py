"""A checkpoint for other people's DeepSpeed scripts: a Hugging Face folder in fp32 and a universal checkpoint.

Source: https://www.deepspeed.ai/tutorials/universal-checkpointing, and deepspeed/checkpoint/ds_to_universal.py for the
files of one.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tostlm.checkpoint import Checkpoint
from tostlm.checkpoint.integrity import find_damage
from tostlm.checkpoint.layout import has_optimizer, read_kind
from tostlm.convert.hf import write_hf
from tostlm.convert.verify import Comparison
from tostlm.errors import UserError
from tostlm.formats.folders import EXPORTED
from tostlm.formats.pickles import save_pickle

LATEST_UNIVERSAL = "latest_universal"
# What an engine looks for of the ranks' own files, at stages 1 and 2, and at stage 3.
RANK_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write_deepspeed(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    """Write the master weights as an export of tostlm's class, and with AdamW's state as a universal checkpoint.

    A script makes its engine of the export, with `"checkpoint": {"load_universal": true}` in its config, and calls
    `engine.load_checkpoint(folder)`; it goes on at any number of ranks.

    Raises:
        UserError: the checkpoint has no state of AdamW, or the export does not compute the same.
    """
    config, state = checkpoint.config, checkpoint.train_state
    if not checkpoint.path.is_dir() or state.imported_from or not has_optimizer(checkpoint.path):
        raise UserError(f"{checkpoint.path} has weights alone; convert it with --to hf, whose files any script loads")
    if config.optimizer.name != "adamw":
        raise UserError(
            f"{checkpoint.path} was trained by {config.optimizer.name}, whose state a universal checkpoint has no "
            "place for; use --to hf"
        )
    if not state.optimizer_steps:
        raise UserError(f"{checkpoint.path} was saved before the first update, without AdamW's state; use --to hf")
    if (damage := find_damage(checkpoint.path)) is not None:
        raise UserError(f"checkpoint {checkpoint.path} is damaged: {damage}; use an older one")
    checkpoint.lm.load_state_dict(dict(read_kind(checkpoint.path, config, "weight")), assign=True)
    compared = write_hf(checkpoint, folder, own_class=True)
    step = folder / f"step-{state.step:08d}_universal"
    _write_universal(checkpoint, step)
    (folder / LATEST_UNIVERSAL).write_text(step.name)
    return compared


def _write_universal(checkpoint: Checkpoint, step: Path) -> None:
    config, progress = checkpoint.config, checkpoint.train_state
    updates, written_by = torch.tensor(float(progress.optimizer_steps)), {"ds_version": version("deepspeed")}
    masters = dict(checkpoint.lm.named_parameters())
    moments = ((kind, read_kind(checkpoint.path, config, kind)) for kind in ("exp_avg", "exp_avg_sq"))
    for name in masters:
        (step / "zero" / f"{EXPORTED}{name}").mkdir(parents=True)
        save_pickle(updates, step / "zero" / f"{EXPORTED}{name}" / "step.pt")
    for kind, tensors in (("fp32", masters.items()), *moments):
        for name, tensor in tensors:
            save_pickle({"param": tensor.detach(), "cat_dim": 0}, step / "zero" / f"{EXPORTED}{name}" / f"{kind}.pt")
    # An engine loads as many of its groups as are named here, and replaces what is said of each: learning rates and the
    # like stay the script's own.
    groups: list[dict[str, Any]] = [{} for _ in masters]
    inner = {"state": {0: {"step": updates}}, "param_groups": groups}  # where stage 3 looks
    save_pickle(
        {**written_by, "param_groups": groups, "optimizer_state_dict": inner}, step / "zero" / "optimizer_state.pt"
    )
    rank = {
        **written_by,
        "module": {},  # its weights are read from zero/
        "dp_world_size": progress.world_size,
        "mp_world_size": 1,
        "global_steps": progress.step,
        "skipped_steps": progress.skipped_steps,
        "universal_checkpoint_info": {"universal_checkpoint_version": 0.2},
    }
    for name in RANK_FILES:
        save_pickle(rank, step / name)
