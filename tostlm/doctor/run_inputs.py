"""Checks of what a run starts from: software, config against devices, disk, prepared data, newest checkpoint."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import tostlm
from tostlm.checkpoint import checkpoints, read_train_state, resolve
from tostlm.checkpoint.branch import find_origin
from tostlm.config import RunConfig, batch_plan, dump_config
from tostlm.data import Tokenizer, common_tokenizer, read_manifest, shard_files, verify
from tostlm.doctor.findings import Finding, find_minority, format_quantity, format_ranks, unhealthy
from tostlm.doctor.hardware import Device
from tostlm.errors import UserError
from tostlm.files import require_writable, write_atomically
from tostlm.launch import RankInfo
from tostlm.plan import checkpoint_bytes, fits, memory, way_out
from tostlm.train.batches import open_data

PACKAGES = ("torch", "deepspeed", "tostlm")
PROBE_BYTES = 1 << 26  # written to measure a disk
MARKER = ".doctor"
SAMPLE_BYTES = 1 << 28  # of shards, checksummed on each host; at least one file of each folder


def measure_versions(config: RunConfig, rank_info: RankInfo) -> dict[str, str]:
    """Return this rank's versions, and digests of tostlm's source and of the config, which change without a version."""
    sources = sorted(Path(tostlm.__file__).parent.rglob("*.py"))
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "source of tostlm": _digest(b"".join(path.read_bytes() for path in sources)),
        "config": _digest(dump_config(config).encode()),
    }


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def check_versions(versions: Sequence[dict[str, str]], hosts: Sequence[str]) -> Finding:
    """Check that all ranks have the same software and config."""
    minority, usual = find_minority([tuple(each.items()) for each in versions])
    if not minority:
        return Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in versions[0].items()))
    theirs, ours = versions[minority[0]], versions[usual]
    differing = [key for key in ours if theirs[key] != ours[key]]
    reason = ", ".join(f"{key} is {theirs[key]} on rank {minority[0]}, elsewhere {ours[key]}" for key in differing)
    return unhealthy("versions", minority, hosts, reason, "install the same there")


def check_config(config: RunConfig, devices: Sequence[Device], hosts: Sequence[str]) -> Finding:
    """Check that the ranks can run the config: batch, precision and memory."""
    world_size = len(devices)
    try:
        plan = batch_plan(config, world_size)
    except UserError as error:
        return Finding("config", "FAIL", str(error))
    if unable := [rank for rank, device in enumerate(devices) if not device.supports_dtype]:
        measured = f"precision is {config.precision}, which {format_ranks(unable, hosts)} cannot multiply in"
        return Finding("config", "FAIL", measured, "train in fp32, or on other devices")
    measured = (
        f"{plan.sequences} sequences per step, {plan.accumulation} gradient accumulation steps; {config.precision}, "
        f"ZeRO stage {config.zero_stage}"
    )
    if any(key.startswith("offload_") for key in config.deepspeed.get("zero_optimization", {})):
        return Finding("config", "ok", measured)
    ranks_on = Counter(hosts)
    available = min(
        device.memory_bytes / (ranks_on[host] if device.kind == "cpu" else 1)
        for device, host in zip(devices, hosts, strict=True)
    )
    on_gpu = devices[0].kind != "cpu"
    need = memory(config, world_size, on_gpu).total
    measured += f"; a step takes {format_quantity(need, 'B')} of {format_quantity(available, 'B')} per rank"
    if not fits(need, available):
        return Finding("config", "FAIL", measured, way_out(config, world_size, available, on_gpu))
    return Finding("config", "ok", measured)


class Disk(NamedTuple):
    """The run's folder as one host sees it."""

    shared: bool  # the host sees the file that rank 0 created there
    free_bytes: int = 0
    write_bytes_per_second: float = 0.0  # to the disk itself
    error: str = ""  # why nothing could be written


@contextmanager
def marked_run_dir(run_dir: Path) -> Iterator[None]:
    """On rank 0: keep a file in the run's folder for the other hosts to see; remove what was created afterwards.

    Raises:
        UserError: nothing can be written there.
    """
    is_new = not run_dir.exists()
    require_writable(run_dir)
    marker = run_dir / MARKER
    try:
        marker.touch()
        yield
    finally:
        marker.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                run_dir.rmdir()


def measure_disk(config: RunConfig, rank_info: RankInfo) -> Disk:
    """Write and sync a file beside rank 0's marker, and remove it again. One rank of each host calls this."""
    folder = config.run_dir
    if not (folder / MARKER).exists():
        return Disk(shared=False)
    free = shutil.disk_usage(folder).free
    probe = folder / f"{MARKER}-{rank_info.rank}"
    content = os.urandom(max(1, min(PROBE_BYTES, free // 2)))
    try:
        start = time.perf_counter()
        write_atomically(probe, content)
        return Disk(True, free, len(content) / (time.perf_counter() - start))
    except OSError as error:
        return Disk(True, free, error=str(error.strerror))
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def checkpoints_to_come(config: RunConfig) -> int:
    """Return how many checkpoints will be added: those kept at the end, and one that is being written beside them."""
    train = config.train
    kept = -(-train.steps // train.save_every_steps)
    if train.keep_last_checkpoints:
        permanent = train.steps // train.keep_every_steps if train.keep_every_steps else 0
        kept = min(kept, train.keep_last_checkpoints + permanent + train.keep_best_checkpoint)
    return max(0, kept - len(checkpoints(config.run_dir))) + 1


def check_disk(disks: Mapping[int, Disk], config: RunConfig, hosts: Sequence[str]) -> Finding:
    """Check that all hosts share the run's folder and that it has room for the checkpoints to come.

    `disks` has what a rank of each host measured, by rank.
    """
    run_dir = config.run_dir
    if not_shared := [rank for rank, disk in disks.items() if not disk.shared]:
        reason = f"{run_dir} does not show there what rank 0 wrote"
        return unhealthy("disk", not_shared, hosts, reason, "put run_dir on a file system that all hosts share")
    for rank, disk in disks.items():
        if disk.error:
            reason = f"cannot write in {run_dir}: {disk.error}"
            return unhealthy("disk", [rank], hosts, reason, "free space or repair it")
    one, count = checkpoint_bytes(config), checkpoints_to_come(config)
    free, rank = min((disk.free_bytes, rank) for rank, disk in disks.items())
    slowest = min(disk.write_bytes_per_second for disk in disks.values())
    measured = f"{format_quantity(free, 'B')} free in {run_dir} for {count} checkpoints of {format_quantity(one, 'B')}"
    if free < one:
        remedy = "free space or choose another run_dir"
        return Finding("disk", "FAIL", f"{measured} ({format_ranks([rank], hosts)})", remedy)
    if free < count * one:
        return Finding("disk", "warn", measured, "free space or set train.keep_last_checkpoints")
    return Finding("disk", "ok", f"{measured}, the slowest host writes {format_quantity(slowest, 'B/s')}")


class PreparedData(NamedTuple):
    """The prepared folders as one host sees them."""

    contents: str = ""  # digests of all folders' contents
    checked_bytes: int = 0  # of shards that were checksummed
    total_bytes: int = 0  # of all shards
    error: str = ""  # what is wrong with them


def measure_data(config: RunConfig, rank_info: RankInfo) -> PreparedData:
    """Read every manifest and checksum a sample of the files. One rank of each host calls this, for its own sample."""
    folders = config.data.folders
    try:
        _open_data(config, rank_info.world_size)
        contents = " ".join(read_manifest(folder).content_sha256[:12] for folder in folders)
        checked, total = 0, 0
        for folder in folders:
            sizes = {name: (folder / name).stat().st_size for name in shard_files(read_manifest(folder))}
            chosen = _choose_sample(sizes, SAMPLE_BYTES // len(folders), rank_info.rank)
            checked += sum(sizes[name] for name in verify(folder, chosen))
            total += sum(sizes.values())
    except UserError as error:
        return PreparedData(error=str(error))
    except OSError as error:
        return PreparedData(error=f"{error.filename} cannot be read: {error.strerror}")
    return PreparedData(contents, checked, total)


def _open_data(config: RunConfig, world_size: int) -> None:
    """Open the data as training does; ranks that do not share its batch, which `check_config` names, open them alone.

    Raises:
        UserError: the data are not what the config asks for.
    """
    try:
        batch_plan(config, world_size)
    except UserError:
        world_size = config.train.context_parallel_size
    open_data(config, world_size)


def _choose_sample(sizes: dict[str, int], budget: int, seed: int) -> list[str]:
    """Return random files of at most `budget` bytes in all, but at least one file."""
    chosen: list[str] = []
    for name in random.Random(seed).sample(sorted(sizes), len(sizes)):
        if not chosen or sizes[name] <= budget:
            chosen.append(name)
            budget -= sizes[name]
    return chosen


def check_data(found: Mapping[int, PreparedData], hosts: Sequence[str]) -> Finding:
    """Check that every host reads the same undamaged data; `found` has what a rank of each host measured, by rank."""
    ranks, seen = list(found), list(found.values())
    if bad := [rank for rank, data in found.items() if data.error]:
        error = found[bad[0]].error
        return Finding("data", "FAIL", error) if bad == ranks else unhealthy("data", bad, hosts, error)
    if minority := find_minority([data.contents for data in seen])[0]:
        others = [ranks[index] for index in minority]
        return unhealthy("data", others, hosts, "it holds other data", "copy the same data there")
    _, checked, total, _ = seen[0]
    share = f"{format_quantity(checked, 'B')} of" if checked < total else "all"
    which = "each" if len(found) > 1 else "the"
    measured = f"{share} {format_quantity(total, 'B')} checksummed on {which} host, one tokenizer"
    return Finding("data", "ok", measured)


def check_resume(config: RunConfig) -> Finding:
    """Check that the checkpoint which the run starts from, as rank 0 sees it, has the tokenizer of the data."""
    if not checkpoints(config.run_dir) and config.train.branch_from is None:
        return Finding("resume", "ok", f"no checkpoint in {config.run_dir}: the run starts at step 0")
    try:
        newest = find_origin(config) or resolve(config.run_dir)
        step = read_train_state(newest).step
        theirs = Tokenizer.from_folder(newest).sha256
        ours = common_tokenizer(config.data.folders).sha256
    except UserError as error:
        return Finding("resume", "FAIL", str(error))
    if theirs != ours:
        measured = f"checkpoint {newest} was trained with another tokenizer than the data has"
        return Finding("resume", "FAIL", measured, "choose another run_dir, or the data it was trained on")
    return Finding("resume", "ok", f"from step {step}, {newest}")
