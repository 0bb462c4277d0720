"""Matrices of which each rank's optimizer holds a part: brought together on one rank each, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class MatrixShard(NamedTuple):
    """A matrix, and the part of it that lies in this rank's optimizer; it may have no elements."""

    name: str
    shape: tuple[int, int]  # rows and columns of the matrix
    blocks: int  # equal blocks of its rows, each a matrix of its own
    owner: Tensor  # the optimizer's tensor that holds the part
    offset: int  # of the part's first element, in `owner`
    elements: tuple[range, ...]  # of the flattened matrix, that each rank holds

    @property
    def numel(self) -> int:
        """Elements of the whole matrix."""
        return self.shape[0] * self.shape[1]

    def part(self, flat: Tensor) -> Tensor:
        """Return a view of this rank's elements in a tensor that is laid out as `owner`."""
        return flat.view(-1)[self.offset : self.offset + len(self.elements[own_rank()])]


class _Transfer(NamedTuple):
    """Elements of a matrix that go from one rank to another."""

    matrix: int
    source: int
    destination: int
    elements: range


def own_rank() -> int:
    """Return this process's rank; 0 where it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def home_ranks(shards: Sequence[MatrixShard]) -> list[int]:
    """Return each matrix's home: a rank that holds as much of it as any, and of those the one with the least to do."""
    work: dict[int, int] = {}
    homes = []
    for shard in shards:
        most = max(map(len, shard.elements))
        ranks = [rank for rank, elements in enumerate(shard.elements) if len(elements) == most]
        home = min(ranks, key=lambda rank: work.get(rank, 0))
        work[home] = work.get(home, 0) + shard.numel * min(shard.shape)
        homes.append(home)
    return homes


def gather_matrices(shards: Sequence[MatrixShard], parts: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return the matrices whose home is this rank, whole and flat, by their places in `shards`. Every rank must call.

    Args:
        parts: of each matrix, this rank's elements.
    """
    homes, own = home_ranks(shards), own_rank()
    transfers = [
        _Transfer(matrix, source, home, elements)
        for matrix, (shard, home) in enumerate(zip(shards, homes, strict=True))
        for source, elements in enumerate(shard.elements)
        if source != home and len(shard.elements[home]) < shard.numel
    ]
    wholes = {}
    for matrix, (shard, home) in enumerate(zip(shards, homes, strict=True)):
        if home == own:
            wholes[matrix] = parts[matrix].new_empty(shard.numel)
            _place(wholes[matrix], shard.elements[own], parts[matrix])
    for transfer, received in _exchange(transfers, lambda transfer: parts[transfer.matrix], like=parts):
        _place(wholes[transfer.matrix], transfer.elements, received)
    return wholes


def scatter_matrices(shards: Sequence[MatrixShard], wholes: dict[int, Tensor], parts: Sequence[Tensor]) -> None:
    """Write into every rank's parts what their homes made of the matrices. Every rank must call this."""
    own = own_rank()
    transfers = [
        _Transfer(matrix, home, destination, elements)
        for matrix, (shard, home) in enumerate(zip(shards, home_ranks(shards), strict=True))
        for destination, elements in enumerate(shard.elements)
        if destination != home and elements
    ]
    for matrix, whole in wholes.items():
        parts[matrix].copy_(_elements(whole, shards[matrix].elements[own]))
    send = lambda transfer: _elements(wholes[transfer.matrix], transfer.elements)  # noqa: E731
    for transfer, received in _exchange(transfers, send, like=parts):
        parts[transfer.matrix].copy_(received)


def _exchange(
    transfers: Sequence[_Transfer], send: Callable[[_Transfer], Tensor], like: Sequence[Tensor]
) -> list[tuple[_Transfer, Tensor]]:
    """Return what comes to this rank of transfers that are the same on all ranks; `send` has what it gives."""
    if not transfers:
        return []
    own, ranks = own_rank(), range(dist.get_world_size())
    outgoing = [t for rank in ranks for t in transfers if (t.source, t.destination) == (own, rank)]
    incoming = [t for rank in ranks for t in transfers if (t.source, t.destination) == (rank, own)]
    sent = torch.cat([like[0].new_empty(0), *map(send, outgoing)])
    received = sent.new_empty(sum(len(t.elements) for t in incoming))
    dist.all_to_all_single(
        received,
        sent,
        [sum(len(t.elements) for t in incoming if t.source == rank) for rank in ranks],
        [sum(len(t.elements) for t in outgoing if t.destination == rank) for rank in ranks],
    )
    return list(zip(incoming, received.split([len(t.elements) for t in incoming]), strict=True))


def _place(whole: Tensor, elements: range, values: Tensor) -> None:
    _elements(whole, elements).copy_(values)


def _elements(whole: Tensor, elements: range) -> Tensor:
    return whole[elements.start : elements.stop]
