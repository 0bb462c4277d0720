"""What goes between ranks: sums over all of them, and a ring of messages that tells the links apart."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from tostlm.doctor.finding import FAIL, NAMED, OK, Finding, amount, unfit
from tostlm.launch import RankInfo
from tostlm.model import best_device

SIZES = {"cpu": (1 << 12, 1 << 20, 1 << 24), "cuda": (1 << 12, 1 << 20, 1 << 24, 1 << 28)}  # bytes of a sum
MESSAGE = {"cpu": 1 << 22, "cuda": 1 << 26}  # bytes, to the next rank
REPEATS = 4
SLOW = 0.5  # of the upper quartile of like links
COMPARABLE = 3  # links of a kind; of two nobody can tell which is slow


class Sums(NamedTuple):
    """All-reduces as a rank saw them."""

    exact: bool
    seconds: tuple[tuple[int, float], ...]  # bytes, and the best time of a sum of them


class Link(NamedTuple):
    """What a rank received from the one before it."""

    exact: bool
    bytes_per_second: float


def measure_sums(ranks: RankInfo) -> Sums:
    """All-reduce integers, which fp32 adds up exactly in any order."""
    device = best_device()
    exact, seconds = True, []
    for size in SIZES[device.type]:
        ramp = torch.arange(size // 4, device=device).remainder(1024).float()
        expected = ranks.world_size * ramp + ranks.world_size * (ranks.world_size - 1) / 2
        times = []
        for _ in range(REPEATS):
            own = ramp + ranks.rank
            times.append(_seconds(partial(dist.all_reduce, own), device))
            exact = exact and torch.equal(own, expected)
        seconds.append((size, min(times)))
    return Sums(exact, tuple(seconds))


def measure_link(ranks: RankInfo) -> Link:
    """Send to the next rank and receive from the one before, all around the ring at once."""
    device = best_device()
    size = MESSAGE[device.type]
    after, before = (ranks.rank + 1) % ranks.world_size, (ranks.rank - 1) % ranks.world_size
    out, received = (_message(sender, size, device) for sender in (ranks.rank, before))
    expected, exact, times = received.clone(), True, []
    for _ in range(REPEATS):
        received.zero_()
        times.append(_seconds(partial(_exchange, out, after, received, before), device))
        exact = exact and torch.equal(received, expected)
    return Link(exact, size / min(times))


def _message(sender: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(size // 4, device=device).add(sender).remainder(251).float()


def _exchange(out: Tensor, after: int, received: Tensor, before: int) -> None:
    sending, receiving = dist.P2POp(dist.isend, out, after), dist.P2POp(dist.irecv, received, before)
    for work in dist.batch_isend_irecv([sending, receiving]):
        work.wait()


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def judge_sums(sums: Sequence[Sums], hosts: Sequence[str]) -> Finding:
    """Whether the sums are right; their bandwidth is that of the algorithm, bytes of a rank / time of the last."""
    wrong = [rank for rank, own in enumerate(sums) if not own.exact]
    if wrong and len(wrong) < len(sums):
        return unfit("all-reduce", wrong, hosts, "sums of integers come out wrong")
    if wrong:
        way_out = "see gemm and ring for the rank at fault, else the network's driver"
        return Finding("all-reduce", FAIL, "sums of integers come out wrong on all ranks", way_out)
    told = []
    for number, (size, _) in enumerate(sums[0].seconds):
        slowest = max(own.seconds[number][1] for own in sums)
        told.append(f"{amount(size / slowest, 'B/s')} at {amount(size, 'B')}")
    return Finding("all-reduce", OK, f"exact; {', '.join(told)} (algorithm bandwidth, bytes / time)")


def judge_links(links: Sequence[Link], hosts: Sequence[str]) -> list[Finding]:
    """Whether each link of the ring carries what it is given, as fast as its like: in a host, or between hosts."""
    rates = {rank: link.bytes_per_second for rank, link in enumerate(links)}
    within = {rank: rate for rank, rate in rates.items() if hosts[rank - 1] == hosts[rank]}
    between = {rank: rate for rank, rate in rates.items() if rank not in within}
    findings = []
    damaged = [rank for rank, link in enumerate(links) if not link.exact]
    if damaged:
        findings.append(_bad(damaged, hosts, "messages arrive damaged"))
    for kind in (within, between):
        if len(kind) < COMPARABLE:
            continue
        usual = sorted(kind.values())[3 * len(kind) // 4]  # above the median, as one bad host spoils two links
        slow = [rank for rank, rate in kind.items() if rate < SLOW * usual]
        if slow:
            why = f"{amount(min(kind.values()), 'B/s')}, where like links reach {amount(usual, 'B/s')}"
            findings.append(_bad(slow, hosts, why))
    last = min(rates, key=lambda rank: rates[rank])
    spread = f"{amount(rates[last], 'B/s')} ({_link(last, hosts)}) to {amount(max(rates.values()), 'B/s')}"
    return findings or [Finding("ring", OK, f"exact; {spread}")]


def _bad(links: Sequence[int], hosts: Sequence[str], why: str) -> Finding:
    """Links are named by the receiving rank; at fault are the hosts at most of their ends, both of a single link."""
    ends = sorted({end % len(hosts) for rank in links for end in (rank - 1, rank)})
    shared = Counter(host for rank in links for host in {hosts[rank - 1], hosts[rank]})
    at_fault = [rank for rank in ends if shared[hosts[rank]] == max(shared.values())]
    named_links = ", ".join(_link(rank, hosts) for rank in links[:NAMED])
    return unfit("ring", at_fault, hosts, f"{named_links}: {why}")


def _link(receiver: int, hosts: Sequence[str]) -> str:
    sender = (receiver - 1) % len(hosts)
    return f"{sender} on {hosts[sender]} -> {receiver} on {hosts[receiver]}"


def best_link(rounds: Sequence[Link]) -> Link:
    """Several measurements of a link as one."""
    return Link(all(one.exact for one in rounds), max(one.bytes_per_second for one in rounds))
