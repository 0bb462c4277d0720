"""Checks of what goes between ranks: all-reduces, the links of a ring, and the hosts' clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.device import best_device
from tostlm.doctor.findings import MAX_NAMED_RANKS, Finding, format_quantity, format_ranks, unhealthy
from tostlm.launch import RankInfo

ALL_REDUCE_BYTES = {"cpu": (1 << 12, 1 << 20, 1 << 24), "cuda": (1 << 12, 1 << 20, 1 << 24, 1 << 28)}
MESSAGE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}  # to the next rank of the ring
REPEATS = 4
SLOW_FRACTION = 0.5  # of the upper quartile of comparable links; a link below it is slow
MIN_COMPARABLE_LINKS = 3  # of two links nobody can tell which one is slow
PINGS = 8
MAX_SKEW_SECONDS = 1.0  # beyond it, logs of several hosts cannot be put in order, nor files by their times


class AllReduce(NamedTuple):
    """All-reduces as one rank saw them: whether all sums were exact, and the best seconds for each size in bytes."""

    exact: bool
    seconds: tuple[tuple[int, float], ...]


class Link(NamedTuple):
    """What a rank received from the rank before it in the ring."""

    exact: bool
    bytes_per_second: float


def measure_all_reduce(rank_info: RankInfo) -> AllReduce:
    """All-reduce integers, which fp32 adds exactly in any order."""
    device = best_device()
    world_size = rank_info.world_size
    exact, seconds = True, []
    for size in ALL_REDUCE_BYTES[device.type]:
        ramp = torch.arange(size // 4, device=device).remainder(1024).float()
        expected = world_size * ramp + world_size * (world_size - 1) / 2
        times = []
        for _ in range(REPEATS):
            values = ramp + rank_info.rank
            times.append(_time_call(partial(dist.all_reduce, values), device))
            exact = exact and torch.equal(values, expected)
        seconds.append((size, min(times)))
    return AllReduce(exact, tuple(seconds))


def measure_link(rank_info: RankInfo) -> Link:
    """Send to the next rank and receive from the one before, on all ranks of the ring at once."""
    device = best_device()
    size, world_size = MESSAGE_BYTES[device.type], rank_info.world_size
    after, before = (rank_info.rank + 1) % world_size, (rank_info.rank - 1) % world_size
    ramp = torch.arange(size // 4, device=device)
    sent, received = (ramp.add(sender).remainder(251).float() for sender in (rank_info.rank, before))
    expected, exact, times = received.clone(), True, []
    for _ in range(REPEATS):
        received.zero_()
        times.append(_time_call(partial(_exchange, sent, after, received, before), device))
        exact = exact and torch.equal(received, expected)
    return Link(exact, size / min(times))


def _exchange(sent: Tensor, after: int, received: Tensor, before: int) -> None:
    sending, receiving = dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()


def _time_call(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def check_all_reduces(results: Sequence[AllReduce], hosts: Sequence[str]) -> Finding:
    """Check that the sums are exact, and report the algorithm bandwidth: bytes of a rank / time of the slowest rank."""
    wrong = [rank for rank, result in enumerate(results) if not result.exact]
    if wrong and len(wrong) < len(results):
        return unhealthy("all-reduce", wrong, hosts, "sums of integers are wrong")
    if wrong:
        remedy = "see gemm and ring for the rank at fault, or else check the network's driver"
        return Finding("all-reduce", "FAIL", "sums of integers are wrong on all ranks", remedy)
    rates = []
    for index, (size, _) in enumerate(results[0].seconds):
        slowest = max(result.seconds[index][1] for result in results)
        rates.append(f"{format_quantity(size / slowest, 'B/s')} at {format_quantity(size, 'B')}")
    return Finding("all-reduce", "ok", f"exact; {', '.join(rates)} (algorithm bandwidth, bytes / time)")


def check_links(links: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """Check that every link delivers what was sent, and that none is slow among links inside, or between, hosts.

    Args:
        links: of each rank, the link from the rank before it.
        hosts: of each rank.
    """
    rates = {rank: link.bytes_per_second for rank, link in enumerate(links)}
    within = {rank: rate for rank, rate in rates.items() if hosts[rank - 1] == hosts[rank]}
    between = {rank: rate for rank, rate in rates.items() if rank not in within}
    findings = []
    damaged = [rank for rank, link in enumerate(links) if not link.exact]
    if damaged:
        findings.append(_link_failure(damaged, hosts, "messages arrive damaged"))
    for group in (within, between):
        if len(group) < MIN_COMPARABLE_LINKS:
            continue
        usual = sorted(group.values())[3 * len(group) // 4]  # not the median: one bad host slows two links
        slow = [rank for rank, rate in group.items() if rate < SLOW_FRACTION * usual]
        if slow:
            slowest = format_quantity(min(group.values()), "B/s")
            reason = f"{slowest}, where comparable links reach {format_quantity(usual, 'B/s')}"
            findings.append(_link_failure(slow, hosts, reason))
    last = min(rates, key=lambda rank: rates[rank])
    fastest = format_quantity(max(rates.values()), "B/s")
    spread = f"{format_quantity(rates[last], 'B/s')} ({_format_link(last, hosts)}) to {fastest}"
    return findings or [Finding("ring", "ok", f"exact; {spread}")]


def _link_failure(links: Sequence[int], hosts: Sequence[str], reason: str) -> Finding:
    """Return the failure of links, given by their receiving ranks.

    The hosts at most of their ends are at fault; for a single link that is both of its hosts.
    """
    ends = sorted({end % len(hosts) for rank in links for end in (rank - 1, rank)})
    links_of_host = Counter(host for rank in links for host in {hosts[rank - 1], hosts[rank]})
    at_fault = [rank for rank in ends if links_of_host[hosts[rank]] == max(links_of_host.values())]
    names = ", ".join(_format_link(rank, hosts) for rank in links[:MAX_NAMED_RANKS])
    return unhealthy("ring", at_fault, hosts, f"{names}: {reason}")


def _format_link(receiver: int, hosts: Sequence[str]) -> str:
    sender = (receiver - 1) % len(hosts)
    return f"{sender} on {hosts[sender]} -> {receiver} on {hosts[receiver]}"


def combine_links(rounds: Sequence[Link]) -> Link:
    """Return several measurements of one link as one: the best speed, and exact only if all were."""
    return Link(all(link.exact for link in rounds), max(link.bytes_per_second for link in rounds))


def measure_clocks(rank_info: RankInfo) -> list[tuple[float, float]]:
    """On rank 0, return how far each rank's clock is ahead of its own and the uncertainty, in seconds; else [].

    The offset is the remote time minus the middle of the shortest round trip, uncertain by half of that trip (Cristian
    1989, Probabilistic clock synchronization).
    """
    if rank_info.rank == 0:
        return [(0.0, 0.0), *(_clock_offset(rank) for rank in range(1, rank_info.world_size))]
    stamp = torch.zeros(1, dtype=torch.float64)
    for _ in range(PINGS):
        dist.recv(stamp, 0)
        stamp.fill_(time.time())
        dist.send(stamp, 0)
    return []


def _clock_offset(rank: int) -> tuple[float, float]:
    stamp, trips = torch.zeros(1, dtype=torch.float64), []
    for _ in range(PINGS):
        sent = time.time()
        dist.send(stamp, rank)
        dist.recv(stamp, rank)
        returned = time.time()
        trips.append((returned - sent, float(stamp) - (sent + returned) / 2))
    trip, offset = min(trips)
    return offset, trip / 2


def check_clocks(offsets: Sequence[tuple[float, float]], hosts: Sequence[str]) -> Finding:
    """Check that all clocks agree with rank 0's, given the offset and uncertainty of each in seconds."""
    wrong = [rank for rank, (offset, error) in enumerate(offsets) if abs(offset) - error > MAX_SKEW_SECONDS]
    if wrong:
        ahead = ", ".join(f"{offsets[rank][0]:+.1f}" for rank in wrong[:MAX_NAMED_RANKS])
        measured = f"{format_ranks(wrong, hosts)}: {ahead} s from rank 0"
        return Finding("clock", "warn", measured, "start NTP there; times in logs are not comparable")
    offset, error = max(offsets, key=lambda measured: abs(measured[0]))
    return Finding("clock", "ok", f"within {1e3 * abs(offset):.2f} ms of rank 0's, +- {1e3 * error:.2f} ms")
