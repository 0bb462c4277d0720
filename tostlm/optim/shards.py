"""Matrices of which each rank's optimizer holds a part: brought together on one rank each, and taken apart again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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


class _Transfer(NamedTuple):
    """Elements of a matrix that go from one rank to another."""

    matrix: int  # its place among the shards
    source: int
    destination: int
    elements: range

    def of(self, wholes: Mapping[int, Tensor]) -> Tensor:
        """Return a view of the elements in their matrix."""
        return wholes[self.matrix][self.elements.start : self.elements.stop]


class MatrixExchange:
    """The way of some matrices to their homes and back. Every rank must make it, and call it, alike."""

    def __init__(self, shards: Sequence[MatrixShard]) -> None:
        self._shards, homes = shards, home_ranks(shards)
        parts = [
            (matrix, rank, home, elements)
            for matrix, (shard, home) in enumerate(zip(shards, homes, strict=True))
            for rank, elements in enumerate(shard.elements)
            if rank != home and elements
        ]
        self._own = [matrix for matrix, home in enumerate(homes) if home == own_rank()]
        self._there = _AllToAll(
            [
                _Transfer(matrix, rank, home, elements)
                for matrix, rank, home, elements in parts
                if len(shards[matrix].elements[home]) < shards[matrix].numel
            ]
        )
        self._back = _AllToAll([_Transfer(matrix, home, rank, elements) for matrix, rank, home, elements in parts])

    def gather(self, parts: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the matrices whose home is this rank, whole and flat, by their places among the shards.

        Args:
            parts: of each matrix, this rank's elements.
        """
        wholes = {}
        for matrix in self._own:
            wholes[matrix] = parts[matrix].new_empty(self._shards[matrix].numel)
            self._own_part(wholes, matrix).copy_(parts[matrix])
        for transfer, received in self._there.run(lambda transfer: parts[transfer.matrix], like=parts):
            transfer.of(wholes).copy_(received)
        return wholes

    def scatter(self, wholes: Mapping[int, Tensor], parts: Sequence[Tensor]) -> None:
        """Write into every rank's parts what their homes made of the matrices."""
        for matrix in wholes:
            parts[matrix].copy_(self._own_part(wholes, matrix))
        for transfer, received in self._back.run(lambda transfer: transfer.of(wholes), like=parts):
            parts[transfer.matrix].copy_(received)

    def share(self, states: Sequence[Tensor]) -> None:
        """Write into every rank's states, one for each matrix and not negative, what they are at the matrix's home."""
        if not states or not dist.is_initialized():
            return
        own = set(self._own)
        everything = torch.cat([s if matrix in own else torch.zeros_like(s) for matrix, s in enumerate(states)])
        dist.all_reduce(everything)
        for state, shared in zip(states, everything.split([len(s) for s in states]), strict=True):
            state.copy_(shared)

    def _own_part(self, wholes: Mapping[int, Tensor], matrix: int) -> Tensor:
        elements = self._shards[matrix].elements[own_rank()]
        return wholes[matrix][elements.start : elements.stop]


class _AllToAll:
    """Transfers that are the same on all ranks, as one collective."""

    def __init__(self, transfers: Sequence[_Transfer]) -> None:
        own = own_rank()
        self._empty = not transfers
        self._outgoing = sorted((t for t in transfers if t.source == own), key=lambda t: t.destination)
        self._incoming = sorted((t for t in transfers if t.destination == own), key=lambda t: t.source)

    def run(self, send: Callable[[_Transfer], Tensor], like: Sequence[Tensor]) -> list[tuple[_Transfer, Tensor]]:
        """Return what comes to this rank; `send` has what it gives, and `like` tensors as those that are sent."""
        if self._empty:
            return []
        sent = torch.cat([like[0].new_empty(0), *map(send, self._outgoing)])
        sizes = [len(t.elements) for t in self._incoming]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(
            received,
            sent,
            _numels([(t.source, t) for t in self._incoming]),
            _numels([(t.destination, t) for t in self._outgoing]),
        )
        return list(zip(self._incoming, received.split(sizes), strict=True))


def _numels(transfers: Sequence[tuple[int, _Transfer]]) -> list[int]:
    """Return the elements by rank."""
    numels = [0] * dist.get_world_size()
    for rank, transfer in transfers:
        numels[rank] += len(transfer.elements)
    return numels
