"""Clocks of the hosts against rank 0's."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tostlm.doctor.finding import NAMED, OK, WARN, Finding, named
from tostlm.launch import RankInfo

PINGS = 8
SKEW_SECONDS = 1.0  # more, and logs of several hosts cannot be put in order, nor files by their times


def measure(ranks: RankInfo) -> list[tuple[float, float]]:
    """On rank 0: of each rank, what its clock is ahead, and how wrong that may be, in seconds; nothing elsewhere.

    The offset is the remote time less the middle of the shortest round trip, wrong by half of it at most (Cristian
    1989).
    """
    if ranks.rank == 0:
        return [(0.0, 0.0), *(_offset(rank) for rank in range(1, ranks.world_size))]
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(stamp, 0)
        stamp.fill_(time.time())
        dist.send(stamp, 0)
    return []


def _offset(rank: int) -> tuple[float, float]:
    stamp, trips = torch.zeros(1, dtype=torch.float64), []
    for _ in range(PINGS):
        sent = time.time()
        dist.send(stamp, rank)
        dist.recv(stamp, rank)
        returned = time.time()
        trips.append((returned - sent, float(stamp) - (sent + returned) / 2))
    trip, offset = min(trips)
    return offset, trip / 2


def judge(offsets: Sequence[tuple[float, float]], hosts: Sequence[str]) -> Finding:
    """Whether all clocks agree with rank 0's."""
    wrong = [rank for rank, (offset, error) in enumerate(offsets) if abs(offset) - error > SKEW_SECONDS]
    if wrong:
        ahead = ", ".join(f"{offsets[rank][0]:+.1f}" for rank in wrong[:NAMED])
        measured = f"{named(wrong, hosts)}: {ahead} s from rank 0"
        return Finding("clock", WARN, measured, "start NTP there; times in logs are not comparable")
    rank = max(range(len(offsets)), key=lambda rank: abs(offsets[rank][0]))
    offset, error = offsets[rank]
    return Finding("clock", OK, f"within {1e3 * abs(offset):.2f} ms of rank 0's, +- {1e3 * error:.2f} ms")
