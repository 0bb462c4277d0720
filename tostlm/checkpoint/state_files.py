"""The files of a checkpoint: which parameters go into which, and writing them for good with their checksums."""

from __future__ import annotations

import hashlib
import heapq
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

FILE_BYTES = 512 << 20  # of a file of state/, unless one parameter is larger
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

Content = bytes | Mapping[str, Tensor]  # of a file; tensors on the host, written as safetensors
Checksum = dict[str, int | str]  # bytes and sha256


def pack(sizes: Mapping[str, int], ranks: int) -> list[list[list[str]]]:
    """Share names of `sizes` bytes out: to each rank about as many, and of a rank's to files of about `FILE_BYTES`."""
    shares = [{name: sizes[name] for name in names} for names in _share(sizes, ranks)]
    return [_share(share, min(len(share), -(-sum(share.values()) // FILE_BYTES))) for share in shares]


def _share(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    shared: list[list[str]] = [[] for _ in range(parts)]
    fullness = [(0, part) for part in range(parts)]
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):  # the largest first, each to the emptiest
        full, part = heapq.heappop(fullness)
        shared[part].append(name)
        heapq.heappush(fullness, (full + sizes[name], part))
    return shared


def write_file(path: Path, content: Content) -> Checksum:
    """Write a file, on disk for good, and return its checksum.

    Raises:
        OSError: it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for piece in [content] if isinstance(content, bytes) else _safetensors(content):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _safetensors(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """A file of safetensors in pieces. The library's writers hold all of it in memory again, or keep no checksum."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors.values():
        yield tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
