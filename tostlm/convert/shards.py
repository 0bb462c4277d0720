"""Weights in safetensors files of limited size, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from tostlm.checkpoint.state_files import safetensors_pieces

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 4 << 30  # of a file, unless one tensor is larger


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors by name to a folder's files; the tensors of one file at most are in memory at a time.

    Raises:
        OSError: they cannot be written.
    """
    files: list[Path] = []
    place: dict[str, int] = {}
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            files.append(_write(folder, len(files), shard))
            shard, size = {}, 0
        place[name], shard[name] = len(files), tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    files.append(_write(folder, len(files), shard))
    if len(files) == 1:
        files[0].rename(folder / SINGLE)
        return
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[number] for name, number in place.items()}}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _write(folder: Path, number: int, shard: dict[str, Tensor]) -> Path:
    path = folder / f"{number}.partial"
    with path.open("wb") as file:
        for piece in safetensors_pieces(shard):
            file.write(piece)
    return path
