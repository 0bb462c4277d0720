"""Checks of what goes between ranks: all-reduces, the links of a ring, and the hosts' clocks."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.config import RunConfig
from tostlm.device import best_device
from tostlm.doctor.findings import Finding, Speed, format_list, format_quantity, format_ranks, unhealthy
from tostlm.launch import RankInfo

ALL_REDUCE_BYTES = {"cpu": (1 << 12, 1 << 20, 1 << 24), "cuda": (1 << 12, 1 << 20, 1 << 24, 1 << 28)}
MESSAGE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}  # to the next rank of the ring
REPEATS = 4
SLOW_FRACTION = 0.5  # of the upper quartile of comparable links; a link below it is slow
MIN_COMPARABLE_LINKS = 3  # of two links nobody can tell which one is slow
PINGS = 8
WRONG_SUMS = "sums of integers are wrong"
MAX_SKEW_SECONDS = 1.0  # beyond it, logs of several hosts cannot be put in order, nor files by their times


def measure_all_reduce(config: RunConfig, rank_info: RankInfo) -> dict[int, Speed]:
    """All-reduce integers, which fp32 adds exactly in any order; return the algorithm bandwidth by size in bytes."""
    device, (rank, _, world_size) = best_device(), rank_info
    speeds = {}
    for size in ALL_REDUCE_BYTES[device.type]:
        ramp = torch.arange(size // 4, device=device).remainder(1024).float()
        total = world_size * ramp + world_size * (world_size - 1) / 2
        values = torch.empty_like(ramp)
        speeds[size] = _time_transfer(partial(dist.all_reduce, values), values, ramp + rank, total, WRONG_SUMS)
    return speeds


def measure_link(config: RunConfig, rank_info: RankInfo) -> Speed:
    """Send to the next rank and receive from the one before, on all ranks of the ring at once."""
    device, (rank, _, world_size) = best_device(), rank_info
    after, before = (rank + 1) % world_size, (rank - 1) % world_size
    ramp = torch.arange(MESSAGE_BYTES[device.type] // 4, device=device)
    sent, expected = (ramp.add(sender).remainder(251).float() for sender in (rank, before))
    received = torch.empty_like(expected)

    def exchange() -> None:
        sending, receiving = dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)
        for work in dist.batch_isend_irecv([sending, receiving]):
            work.wait()

    return _time_transfer(exchange, received, torch.zeros_like(expected), expected, "messages arrive damaged")


def _time_transfer(transfer: Callable[[], object], buffer: Tensor, before: Tensor, after: Tensor, fault: str) -> Speed:
    """Return the best speed of a transfer that turns a buffer from `before` to `after`, or with the fault otherwise."""
    exact, best = True, math.inf
    for _ in range(REPEATS):
        buffer.copy_(before)
        start = time.perf_counter()
        transfer()
        if buffer.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
        exact = exact and torch.equal(buffer, after)
    return Speed(buffer.nbytes / best, "" if exact else fault)


def check_all_reduces(results: Sequence[Mapping[int, Speed]], hosts: Sequence[str]) -> Finding:
    """Check that the sums are exact, and report the algorithm bandwidth: bytes of a rank / time of the slowest rank."""
    wrong = [rank for rank, speeds in enumerate(results) if any(speed.fault for speed in speeds.values())]
    if wrong and len(wrong) < len(results):
        return unhealthy("all-reduce", wrong, hosts, WRONG_SUMS)
    if wrong:
        remedy = "see gemm and ring for the rank at fault, or else check the network's driver"
        return Finding("all-reduce", "FAIL", f"{WRONG_SUMS} on all ranks", remedy)
    rates = []
    for size in results[0]:
        slowest = min(speeds[size].per_second for speeds in results)
        rates.append(f"{format_quantity(slowest, 'B/s')} at {format_quantity(size, 'B')}")
    return Finding("all-reduce", "ok", f"exact; {', '.join(rates)} (algorithm bandwidth, bytes / time)")


def check_links(links: Sequence[Speed], hosts: Sequence[str]) -> list[Finding]:
    """Check that every link delivers what was sent, and that none is slow among links inside, or between, hosts.

    A link belongs to the rank that receives, from the rank before it.
    """
    rates = {rank: link.per_second for rank, link in enumerate(links)}
    within = {rank: rate for rank, rate in rates.items() if hosts[rank - 1] == hosts[rank]}
    between = {rank: rate for rank, rate in rates.items() if rank not in within}
    findings = []
    if damaged := [rank for rank, link in enumerate(links) if link.fault]:
        findings.append(_link_failure(damaged, hosts, links[damaged[0]].fault))
    for group in (within, between):
        if len(group) < MIN_COMPARABLE_LINKS:
            continue
        usual = sorted(group.values())[3 * len(group) // 4]  # not the median: one bad host slows two links
        if slow := [rank for rank, rate in group.items() if rate < SLOW_FRACTION * usual]:
            slowest = format_quantity(min(group.values()), "B/s")
            reason = f"{slowest}, where comparable links reach {format_quantity(usual, 'B/s')}"
            findings.append(_link_failure(slow, hosts, reason))
    last = min(rates, key=rates.__getitem__)
    slowest, fastest = (format_quantity(rate, "B/s") for rate in (rates[last], max(rates.values())))
    return findings or [Finding("ring", "ok", f"exact; {slowest} ({_format_link(last, hosts)}) to {fastest}")]


def _link_failure(links: Sequence[int], hosts: Sequence[str], reason: str) -> Finding:
    """Return the failure of links, given by their receiving ranks.

    The hosts at most of their ends are at fault; for a single link that is both of its hosts.
    """
    ends = sorted({end % len(hosts) for rank in links for end in (rank - 1, rank)})
    links_of_host = Counter(host for rank in links for host in {hosts[rank - 1], hosts[rank]})
    at_fault = [rank for rank in ends if links_of_host[hosts[rank]] == max(links_of_host.values())]
    names = format_list([_format_link(rank, hosts) for rank in links])
    return unhealthy("ring", at_fault, hosts, f"{names}: {reason}")


def _format_link(receiver: int, hosts: Sequence[str]) -> str:
    sender = (receiver - 1) % len(hosts)
    return f"{sender} on {hosts[sender]} -> {receiver} on {hosts[receiver]}"


def measure_clock(config: RunConfig, rank_info: RankInfo) -> tuple[float, float]:
    """Return how far this rank's clock is ahead of rank 0's, and the uncertainty, in seconds.

    The offset is the middle of the shortest round trip minus the remote time, uncertain by half of that trip (Cristian
    1989, Probabilistic clock synchronization).
    """
    stamp, trips = torch.zeros(1, dtype=torch.float64), []
    if rank_info.rank == 0:  # answers the others, one after another
        for rank in range(1, rank_info.world_size):
            for _ in range(PINGS):
                dist.recv(stamp, rank)
                dist.send(stamp.fill_(time.time()), rank)
        return 0.0, 0.0
    for _ in range(PINGS):
        sent = time.time()
        dist.send(stamp, 0)
        dist.recv(stamp, 0)
        returned = time.time()
        trips.append((returned - sent, (sent + returned) / 2 - float(stamp)))
    trip, offset = min(trips)
    return offset, trip / 2


def check_clocks(offsets: Sequence[tuple[float, float]], hosts: Sequence[str]) -> Finding:
    """Check that all clocks agree with rank 0's, given the offset and uncertainty of each in seconds."""
    if wrong := [rank for rank, (offset, error) in enumerate(offsets) if abs(offset) - error > MAX_SKEW_SECONDS]:
        ahead = format_list([f"{offsets[rank][0]:+.1f}" for rank in wrong])
        measured = f"{format_ranks(wrong, hosts)}: {ahead} s from rank 0"
        return Finding("clock", "warn", measured, "start NTP there; times in logs are not comparable")
    offset, error = max(offsets, key=lambda measured: abs(measured[0]))
    return Finding("clock", "ok", f"within {1e3 * abs(offset):.2f} ms of rank 0's, +- {1e3 * error:.2f} ms")
