"""What a check comes to, and what all verdicts share: names of ranks, amounts, who is in the minority."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Final, Literal, NamedTuple

OK: Final = "ok"
WARN: Final = "warn"
FAIL: Final = "FAIL"
NAMED = 8  # ranks in a message


class Finding(NamedTuple):
    """A line of the table."""

    check: str
    level: Literal["ok", "warn", "FAIL"]
    measured: str
    way_out: str = ""
    unfit: tuple[int, ...] = ()  # ranks whose machine is at fault

    def line(self) -> str:
        """As the table has it."""
        return f"{self.level:<6}{self.check:<12}{self.measured}{'; ' if self.way_out else ''}{self.way_out}"


def unfit(check: str, ranks: Sequence[int], hosts: Sequence[str], why: str, mend: str = "") -> Finding:
    """A failure that is these ranks' fault; the way out is to `mend` that or to leave their hosts out."""
    are = "is" if len(ranks) == 1 else "are"
    exclude = f"exclude {', '.join(distinct(hosts[rank] for rank in ranks))}"
    way_out = f"{mend}, or {exclude}" if mend else exclude
    return Finding(check, FAIL, f"{named(ranks, hosts)} {are} unfit: {why}", way_out, tuple(ranks))


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 3 on node7`, or several."""
    several = "s" if len(ranks) > 1 else ""
    rest = f" and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return f"rank{several} {', '.join(f'{rank} on {hosts[rank]}' for rank in ranks[:NAMED])}{rest}"


def amount(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: `1.23 GB/s`."""
    for prefix in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} T{unit}"


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each value once, in the order they first come in."""
    return list(dict.fromkeys(values))


def minority(values: Sequence[Hashable]) -> tuple[list[int], int]:
    """The ranks whose value is not the commonest, and a rank whose value is; between equals rank 0's side is right."""
    ((commonest, _),) = Counter(values).most_common(1)
    return [rank for rank, value in enumerate(values) if value != commonest], values.index(commonest)


def complaint(findings: Sequence[Finding]) -> str:
    """The failures in one line: each check's, then the ways out, each once; empty where nothing fails."""
    failed = [finding for finding in findings if finding.level == FAIL]
    return "; ".join(
        [
            *(f"{finding.check}: {finding.measured}" for finding in failed),
            *distinct(finding.way_out for finding in failed if finding.way_out),
        ]
    )


def report(findings: Sequence[Finding], hosts: Sequence[str]) -> dict[str, Any]:
    """The same for a machine; `exclude` are the hosts of unfit ranks, "" where a rank never said its host."""
    ranks = sorted({rank for finding in findings for rank in finding.unfit})
    return {
        "fit": not complaint(findings),
        "hosts": list(hosts),
        "unfit_ranks": ranks,
        "exclude": distinct(hosts[rank] for rank in ranks),
        "checks": [finding._asdict() for finding in findings],
    }
