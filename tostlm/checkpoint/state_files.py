"""The files of a checkpoint: which parameters go into which, and writing them durably with their checksums."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tostlm.checkpoint.integrity import COMPLETE, Checksum

FILE_BYTES = 512 << 20  # about the size of a file in state/, unless one parameter is larger
WRITE_BYTES = 64 << 20  # at once
# safetensors' names: https://github.com/huggingface/safetensors#format
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

Content = bytes | Mapping[str, Tensor]  # of a file; tensors are on the host and written as safetensors


def assign_files(sizes: Mapping[str, int], world_size: int) -> list[list[list[str]]]:
    """Return the parameters of each file of each rank: balanced by `sizes` in bytes, in files of about `FILE_BYTES`."""
    shares = [{name: sizes[name] for name in names} for names in _balance(sizes, world_size)]
    return [_balance(share, min(len(share), -(-sum(share.values()) // FILE_BYTES))) for share in shares]


def _balance(sizes: Mapping[str, int], bins: int) -> list[list[str]]:
    """Distribute names over bins of about equal size: the largest first, each into the emptiest bin."""
    names_of: list[list[str]] = [[] for _ in range(bins)]
    fullness = [(0, index) for index in range(bins)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, index = heapq.heappop(fullness)
        names_of[index].append(name)
        heapq.heappush(fullness, (size + sizes[name], index))
    return names_of


def write_file(path: Path, content: Content, on_progress: Callable[[], object] = lambda: None) -> Checksum:
    """Write a file durably and return its checksum; `on_progress` is called as often as something was written.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for whole in [content] if isinstance(content, bytes) else safetensors_pieces(content):
            for start in range(0, len(whole), WRITE_BYTES):
                piece = whole[start : start + WRITE_BYTES]
                file.write(piece)
                digest.update(piece)
                size += len(piece)
                on_progress()
        file.flush()
        os.fsync(file.fileno())
        on_progress()
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_checksums(checkpoint: Path, checksums: Mapping[str, Checksum]) -> None:
    """Write the file that makes a folder a whole checkpoint: which files it has, and what is in them.

    Raises:
        OSError: it cannot be written.
    """
    write_file(checkpoint / COMPLETE, f"{json.dumps(checksums, indent=1)}\n".encode())


def safetensors_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece, so that it is hashed as it is written, which the library cannot do."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # without which transformers loads no file
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
