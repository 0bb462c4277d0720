"""The examination: which questions, in which order, and what becomes of ranks that do not answer them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tostlm.config import RunConfig, matmul_dtype
from tostlm.doctor import clocks, devices, disk, gemm, inputs, plan, traffic, versions
from tostlm.doctor.finding import FAIL, Finding, named, unfit
from tostlm.doctor.meeting import Answer, Coordinator, RankTimeout
from tostlm.errors import UserError

ROUNDS = 3  # of a measurement in which something fails: what passes once was disturbed before


def measures(config: RunConfig, meeting: Coordinator) -> dict[str, Callable[[], Any]]:
    """What this rank does when it is asked; what is of a host is done by one rank there, the others answer nothing."""
    ranks = meeting.ranks

    def of_host(measure: Callable[[RunConfig, int], Any]) -> Callable[[], Any]:
        return lambda: measure(config, ranks.rank) if meeting.first_of_host else None

    return {
        "versions": lambda: versions.measure(config),
        "devices": lambda: devices.measure(matmul_dtype(config)),
        "gemm": lambda: gemm.measure(matmul_dtype(config)),
        "disk": of_host(disk.measure),
        "data": of_host(inputs.measure),
        "connect": meeting.connect_group,
        "all-reduce": lambda: traffic.measure_sums(ranks),
        "ring": lambda: traffic.measure_link(ranks),
        "clock": lambda: clocks.measure(ranks),
    }


class ExaminationAborted(Exception):
    """Nothing more can be asked, for this reason."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding)
        self.finding = finding


def examine(config: RunConfig, meeting: Coordinator) -> Iterator[Finding]:
    """On rank 0: one finding after another. What all ranks do together comes last, as a failure there ends it."""
    known = measures(config, meeting)
    try:
        _gather(meeting)
        yield from _alone(config, meeting, known)
        yield from _together(config, meeting, known)
    except ExaminationAborted as ended:
        yield ended.finding
    meeting.end()


def _alone(config: RunConfig, meeting: Coordinator, known: Mapping[str, Callable[[], Any]]) -> Iterator[Finding]:
    hosts = meeting.hosts
    yield versions.judge(_ask(meeting, "versions", known), hosts)
    found = [devices.Device(*value) for value in _ask(meeting, "devices", known)]
    yield devices.judge(found, hosts)
    yield plan.judge(config, found, hosts)
    yield from _rounds(
        lambda: [gemm.Gemm(*value) for value in _ask(meeting, "gemm", known)],
        gemm.best,
        lambda gemms: gemm.judge(gemms, hosts),
    )
    try:
        with disk.marked(config.run_dir):
            disks = [(r, disk.Disk(*value)) for r, value in enumerate(_ask(meeting, "disk", known)) if value]
            yield disk.judge(disks, config, hosts)
    except (UserError, OSError) as error:
        yield Finding("disk", FAIL, str(error))
    data = [(r, inputs.Data(*value)) for r, value in enumerate(_ask(meeting, "data", known)) if value]
    yield inputs.judge(data, hosts)
    if not any(own.error for _, own in data):
        yield inputs.resumption(config)


def _together(config: RunConfig, meeting: Coordinator, known: Mapping[str, Callable[[], Any]]) -> Iterator[Finding]:
    hosts = meeting.hosts
    _ask(meeting, "connect", known)
    yield traffic.judge_sums([traffic.Sums(*value) for value in _ask(meeting, "all-reduce", known)], hosts)
    if meeting.ranks.world_size > 1:
        yield from _rounds(
            lambda: [traffic.Link(*value) for value in _ask(meeting, "ring", known)],
            traffic.best_link,
            lambda links: traffic.judge_links(links, hosts),
        )
        yield clocks.judge(_ask(meeting, "clock", known)[0], hosts)


def _rounds(
    measure: Callable[[], list[Any]],
    best: Callable[[Sequence[Any]], Any],
    judge: Callable[[Sequence[Any]], list[Finding]],
) -> list[Finding]:
    """The verdict on the best of each rank, measured again while something fails."""
    rounds: list[list[Any]] = []
    while True:
        rounds.append(measure())
        findings = judge([best(own) for own in zip(*rounds, strict=True)])
        if len(rounds) == ROUNDS or all(finding.level != FAIL for finding in findings):
            return findings


def _gather(meeting: Coordinator) -> None:
    try:
        meeting.gather()
    except RankTimeout as silence:
        ranks = ", ".join(map(str, silence.ranks))
        why = f"rank(s) {ranks} of {meeting.ranks.world_size} did not arrive within {meeting.timeout_seconds:g} s"
        way_out = "see whether they started and reach rank 0's address, or exclude their hosts"
        raise ExaminationAborted(Finding("ranks", FAIL, why, way_out, silence.ranks)) from None


def _ask(meeting: Coordinator, question: str, known: Mapping[str, Callable[[], Any]]) -> list[Any]:
    """What all ranks measured.

    Raises:
        Ended: some are silent, or could not.
    """
    hosts = meeting.hosts
    try:
        answers: list[Answer] = meeting.ask(question, known)
    except RankTimeout as silence:
        why = f"no answer within {meeting.timeout_seconds:g} s"
        raise ExaminationAborted(unfit(question, silence.ranks, hosts, why)) from None
    failed = [rank for rank, answer in enumerate(answers) if answer.error]
    if not failed:
        return [answer.value for answer in answers]
    why = answers[failed[0]].error
    if len(failed) < len(answers):
        raise ExaminationAborted(unfit(question, failed, hosts, why))
    way_out = "see that all hosts reach each other by the network interface that they use"
    raise ExaminationAborted(Finding(question, FAIL, f"{named(failed, hosts)}: {why}", way_out))
