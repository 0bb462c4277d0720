"""Runs that begin from a checkpoint of another run: its copy is the first checkpoint of theirs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tostlm.checkpoint.folders import partial_folder, publish
from tostlm.checkpoint.integrity import (
    COMPLETE,
    CONFIG,
    TRAIN_STATE,
    Checksum,
    find_damage,
    read_checksums,
)
from tostlm.checkpoint.layout import (
    RECURRENT_STATE,
    STATE,
    WEIGHTS,
    TrainState,
    checkpoint_folder,
    checkpoints,
    data_sha256,
    has_optimizer,
    read_train_state,
    read_weights,
    resolve,
    run_folder,
)
from tostlm.checkpoint.rollback import following_checkpoints, read_record
from tostlm.checkpoint.state_files import assign_files, write_file
from tostlm.config import RunConfig, dump_config, fixed_values, load_config
from tostlm.data import Tokenizer
from tostlm.errors import UserError

# What the branch must have in common with the other run, beside the tokenizer and the model: what its optimizer holds.
KEPT = ("precision", "optimizer.name", "optimizer.muon.normuon_beta2")


def find_origin(config: RunConfig) -> Path | None:
    """Return the checkpoint that a run which has yet to begin does so from, as far as configs tell; None if from none.

    That is `train.branch_from` itself, or of a run's folder the newest checkpoint that the run itself would follow.

    Raises:
        UserError: there is no checkpoint, its step is past the run's last, the model or the optimizer differ, or
            `run_dir` is the other run's or among its checkpoints.
    """
    if config.train.branch_from is None or checkpoints(config.run_dir):
        return None
    following = [path for path in following_checkpoints(config.train.branch_from) if (path / COMPLETE).is_file()]
    checkpoint = following[-1] if following else resolve(config.train.branch_from)
    state = read_train_state(checkpoint)
    step = _first_step(state)
    if step >= config.train.steps:
        raise UserError(
            f"train.steps {config.train.steps} is not above step {step} of {checkpoint}, from which the run begins: "
            "steps are counted on; raise it"
        )
    folder, run_dir = run_folder(checkpoint).resolve(), config.run_dir.resolve()
    if run_dir == folder or run_dir.is_relative_to(folder / "checkpoints"):
        raise UserError(f"run_dir {config.run_dir} is that of {checkpoint}, or in it; choose another run_dir")
    theirs, own = fixed_values(load_config(checkpoint / CONFIG)), fixed_values(config)
    kept = KEPT if has_optimizer(checkpoint) else ()
    for key in {**theirs, **own}:
        old, new = theirs.get(key, "unset"), own.get(key, "unset")
        if (key in kept or key.startswith("model.")) and old != new:
            raise UserError(f"{checkpoint} has {key}={old}, this run {key}={new}; a run that begins from it needs its")
    return checkpoint


def branch(config: RunConfig, tokenizer: Tokenizer) -> Path:
    """Make a copy of the checkpoint that `train.branch_from` names the first one of a new run, and return it.

    Steps are counted on, but for models of other formats. Where data, batches and seed are those of the other run, the
    data are read on too, else from their start, but with a curriculum, whose stages go by steps. Files that stay as
    they are become links where both runs lie on one file system. Of a checkpoint of weights alone the optimizer starts
    anew.

    Raises:
        UserError: it is damaged, does not fit, or cannot be copied.
    """
    origin = find_origin(config)
    assert origin is not None
    if (damage := find_damage(origin)) is not None:
        raise UserError(f"checkpoint {origin} is damaged: {damage}; begin from another")
    if Tokenizer.from_folder(origin).sha256 != tokenizer.sha256:
        folders = ", ".join(map(str, config.data.folders))
        raise UserError(f"checkpoint {origin} was trained with another tokenizer than {folders}; use its own")
    state, data, optimizer = _progress(origin), data_sha256(config), has_optimizer(origin)
    state = state._replace(step=_first_step(state))
    if not optimizer:
        state = state._replace(optimizer_steps=0, loss_scale=None, ema_updates=None)
    goes_on = state.data_sha256 == data and fixed_values(load_config(origin / CONFIG)) == fixed_values(config)
    state = state._replace(
        data_step=state.data_step if goes_on else state.step if config.data.curriculum else 0,
        good_losses=state.good_losses if goes_on else (),
        validation_loss=None,
        skipped_steps=0,
        rollbacks=0,
        data_sha256=data,
        branched_from=str(origin.absolute()),
    )
    try:
        return _copy(origin, config, state, with_recurrent_state=goes_on)
    except OSError as error:
        shutil.rmtree(partial_folder(checkpoint_folder(config.run_dir, state.step)), ignore_errors=True)
        raise UserError(f"checkpoint {origin} cannot be copied to {config.run_dir}: {error.strerror}") from None


def _progress(origin: Path) -> TrainState:
    """Return the progress of the other run, with the data that it left out in a rollback to this checkpoint."""
    state, last = read_train_state(origin), read_record(run_folder(origin))
    return state if last is None or last.step != state.step else state._replace(data_step=last.data_step)


def _first_step(origin: TrainState) -> int:
    """Return the step that a run begins at from a checkpoint with this progress."""
    return 0 if origin.imported_from else origin.step


def _copy(origin: Path, config: RunConfig, state: TrainState, with_recurrent_state: bool) -> Path:
    folder = checkpoint_folder(config.run_dir, state.step)
    partial = partial_folder(folder)
    (partial / STATE).mkdir(parents=True, exist_ok=True)
    own = {CONFIG: dump_config(config).encode(), TRAIN_STATE: state.to_json().encode()}
    left_out = own.keys() | (set() if with_recurrent_state else {RECURRENT_STATE})
    checksums = {name: write_file(partial / name, content) for name, content in own.items()}
    if not has_optimizer(origin):
        checksums |= _write_masters(origin, config, partial)
        left_out |= {WEIGHTS}
    for name, checksum in read_checksums(origin).items():
        if name not in left_out:
            _link_or_copy(origin / name, partial / name)
            checksums[name] = checksum
    publish(partial, folder, checksums)
    return folder


def _write_masters(origin: Path, config: RunConfig, partial: Path) -> dict[str, Checksum]:
    """Write the state of an optimizer that has made no update: weights in fp32; moments that are not there are zero."""
    weights, checksums = read_weights(origin, config), {}
    for name, weight in weights.items():
        if not bool(weight.isfinite().all()):
            raise UserError(f"checkpoint {origin}: {name} is not finite; begin from another")
    (files,) = assign_files({name: 4 * weight.numel() for name, weight in weights.items()}, 1)
    for number, names in enumerate(files):
        file = f"{STATE}/{number:05d}.safetensors"
        checksums[file] = write_file(partial / file, {f"{name}/weight": weights[name].float() for name in names})
    return checksums


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def require_same_origin(config: RunConfig, newest: Path) -> None:
    """Check that a run which has a checkpoint began where its config now says, if it says so.

    Raises:
        UserError: it began elsewhere.
    """
    if config.train.branch_from is None:
        return
    began, asked = read_train_state(newest).branched_from, config.train.branch_from
    # The folder of a run stood for its newest checkpoint then.
    places = [Path(began), run_folder(Path(began))] if began else []
    if asked.absolute() not in places and asked.resolve() not in [place.resolve() for place in places]:
        where = f"began from {began}" if began else "began anew"
        raise UserError(
            f"{config.run_dir} {where}, not from train.branch_from {asked}; choose another run_dir, or leave "
            "train.branch_from out to resume it"
        )
