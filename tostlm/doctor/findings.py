"""The result of a check, the report of all results, and the wording that the checks share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Literal, NamedTuple, TypeVar

Value = TypeVar("Value", bound=Hashable)

MAX_NAMED = 8  # ranks in one message


class Finding(NamedTuple):
    """The result of one check."""

    check: str
    level: Literal["ok", "warn", "FAIL"]
    measured: str  # what was found
    remedy: str = ""  # what to do about it
    unhealthy_ranks: tuple[int, ...] = ()  # whose host is at fault

    def format_line(self) -> str:
        """Return the finding as a line of the printed table."""
        return f"{self.level:<6}{self.check:<12}{self.measured}{'; ' if self.remedy else ''}{self.remedy}"


class Speed(NamedTuple):
    """How fast a rank's device, or the link to it, is."""

    per_second: float  # floating-point operations, or bytes
    fault: str = ""  # what is wrong with the results

    def combine(self, other: Speed) -> Speed:
        """Return two measurements as one: the better speed, and the fault of either."""
        return Speed(max(self.per_second, other.per_second), self.fault or other.fault)


def unhealthy(check: str, ranks: Sequence[int], hosts: Sequence[str], reason: str, repair: str = "") -> Finding:
    """Return a failure whose cause is the hosts of `ranks`; the remedy is `repair`, or to exclude these hosts."""
    verb = "is" if len(ranks) == 1 else "are"
    exclude = f"exclude {', '.join(unique(hosts[rank] for rank in ranks))}"
    remedy = f"{repair}, or {exclude}" if repair else exclude
    return Finding(check, "FAIL", f"{format_ranks(ranks, hosts)} {verb} unhealthy: {reason}", remedy, tuple(ranks))


def format_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Return the names of ranks with their hosts, as `rank 3 on node7`."""
    plural = "s" if len(ranks) > 1 else ""
    return f"rank{plural} {format_list([f'{rank} on {hosts[rank]}' for rank in ranks])}"


def format_list(items: Sequence[str]) -> str:
    """Return the first items, separated by commas, and how many more there are."""
    rest = f" and {len(items) - MAX_NAMED} more" if len(items) > MAX_NAMED else ""
    return ", ".join(items[:MAX_NAMED]) + rest


def format_quantity(value: float, unit: str) -> str:
    """Return a value with three digits and a decimal prefix, as `1.23 GB/s`."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def unique(values: Iterable[Value]) -> list[Value]:
    """Return each value once, in order of first occurrence."""
    return list(dict.fromkeys(values))


def find_minority(values: Sequence[Hashable]) -> tuple[list[int], int]:
    """Return the ranks whose value is not the most common one, and one rank whose value is.

    Of equally common values rank 0's counts as the most common one.
    """
    ((commonest, _),) = Counter(values).most_common(1)
    return [rank for rank, value in enumerate(values) if value != commonest], values.index(commonest)


def summarize_failures(findings: Sequence[Finding]) -> str:
    """Return all failures in one line, then each remedy once; "" if nothing failed."""
    failed = [finding for finding in findings if finding.level == "FAIL"]
    remedies = unique(finding.remedy for finding in failed if finding.remedy)
    return "; ".join([*(f"{finding.check}: {finding.measured}" for finding in failed), *remedies])


def build_report(findings: Sequence[Finding], hosts: Sequence[str]) -> dict[str, object]:
    """Return the content of the JSON report. A rank that never reported its host is "" in `hosts` and `exclude`."""
    ranks = sorted({rank for finding in findings for rank in finding.unhealthy_ranks})
    return {
        "healthy": not summarize_failures(findings),
        "hosts": list(hosts),
        "unhealthy_ranks": ranks,
        "exclude": unique(hosts[rank] for rank in ranks),
        "checks": [finding._asdict() for finding in findings],
    }
