"""`tostlm doctor`: which checks are made, in which order, and what happens when ranks do not answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tostlm.config import RunConfig, matmul_dtype
from tostlm.doctor import hardware, network, run_inputs
from tostlm.doctor.coordinator import Coordinator, DoctorAborted, Measurement
from tostlm.doctor.findings import Finding, build_report, summarize_failures
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically
from tostlm.launch import RankInfo

Measured = TypeVar("Measured")

MAX_ROUNDS = 3  # of a measurement that fails: one pass shows that the failure was a disturbance


def run_doctor(config: RunConfig, rank_info: RankInfo, timeout_seconds: float, out: Path | None) -> None:
    """Check what a run of this config on these ranks would meet. Every rank calls this.

    Rank 0 prints a line for each check as it is made, and writes them all to `out` as JSON.

    Args:
        timeout_seconds: a rank that does not answer within it is unhealthy.
        out: a .json file.

    Raises:
        UserError: on rank 0, a check fails; elsewhere, rank 0 does not answer.
    """
    if out and rank_info.rank == 0:
        require_file_writable(out)
    coordinator = Coordinator(rank_info, timeout_seconds)
    if rank_info.rank:
        coordinator.serve(_measurements(config, coordinator))
        return
    findings = []
    for finding in _Examination(config, coordinator).run():
        print(finding.format_line(), flush=True)
        findings.append(finding)
    if out:
        write_atomically(out, json.dumps(build_report(findings, coordinator.hosts), indent=2) + "\n")
    if failures := summarize_failures(findings):
        raise UserError(failures)


def _measurements(config: RunConfig, coordinator: Coordinator) -> dict[str, Measurement]:
    """Return what this rank measures for each question; what concerns a host is measured by its first rank only."""
    rank_info = coordinator.rank_info

    def once_per_host(measure: Callable[[RunConfig, int], object]) -> Measurement:
        return lambda: measure(config, rank_info.rank) if coordinator.first_of_host else None

    return {
        "versions": lambda: run_inputs.measure_versions(config),
        "devices": lambda: hardware.measure_device(matmul_dtype(config)),
        "gemm": lambda: hardware.measure_gemm(matmul_dtype(config)),
        "disk": once_per_host(run_inputs.measure_disk),
        "data": once_per_host(run_inputs.measure_data),
        "connect": coordinator.connect_group,
        "all-reduce": lambda: network.measure_all_reduce(rank_info),
        "ring": lambda: network.measure_link(rank_info),
        "clock": lambda: network.measure_clocks(rank_info),
    }


class _Examination:
    """The checks that rank 0 makes, in order. Collectives come last: a failure there ends the examination."""

    def __init__(self, config: RunConfig, coordinator: Coordinator) -> None:
        self._config, self._coordinator = config, coordinator
        self._measurements = _measurements(config, coordinator)

    def run(self) -> Iterator[Finding]:
        """Yield one finding after another."""
        try:
            self._coordinator.gather_hosts()
            yield from self._check_each_rank()
            yield from self._check_collectives()
        except DoctorAborted as aborted:
            yield aborted.finding
        self._coordinator.end()

    def _check_each_rank(self) -> Iterator[Finding]:
        config, hosts = self._config, self._coordinator.hosts
        yield run_inputs.check_versions(self._ask("versions", dict), hosts)
        devices = self._ask("devices", hardware.Device._make)
        yield hardware.check_devices(devices, hosts)
        yield run_inputs.check_config(config, devices, hosts)
        yield from _check_repeatedly(
            lambda: self._ask("gemm", hardware.Gemm._make),
            hardware.combine_gemms,
            lambda gemms: hardware.check_gemms(gemms, hosts),
        )
        try:
            with run_inputs.marked_run_dir(config.run_dir):
                yield run_inputs.check_disk(self._ask_hosts("disk", run_inputs.Disk._make), config, hosts)
        except (UserError, OSError) as error:
            yield Finding("disk", "FAIL", str(error))
        data = self._ask_hosts("data", run_inputs.PreparedData._make)
        yield run_inputs.check_data(data, hosts)
        if not any(each.error for _, each in data):
            yield run_inputs.check_resume(config)

    def _check_collectives(self) -> Iterator[Finding]:
        hosts = self._coordinator.hosts
        self._ask("connect", lambda nothing: nothing)
        yield network.check_all_reduces(self._ask("all-reduce", network.AllReduce._make), hosts)
        if self._coordinator.rank_info.world_size > 1:
            yield from _check_repeatedly(
                lambda: self._ask("ring", network.Link._make),
                network.combine_links,
                lambda links: network.check_links(links, hosts),
            )
            yield network.check_clocks(self._ask("clock", list)[0], hosts)

    def _ask(self, question: str, decode: Callable[[Any], Measured]) -> list[Measured]:
        return self._coordinator.ask(question, self._measurements[question], decode)

    def _ask_hosts(self, question: str, decode: Callable[[Any], Measured]) -> list[tuple[int, Measured]]:
        """Return the first rank of each host and what it measured."""
        answers = self._ask(question, lambda value: None if value is None else decode(value))
        return [(rank, answer) for rank, answer in enumerate(answers) if answer is not None]


def _check_repeatedly(
    measure: Callable[[], list[Measured]],
    combine: Callable[[Sequence[Measured]], Measured],
    check: Callable[[Sequence[Measured]], list[Finding]],
) -> list[Finding]:
    """Measure all ranks up to MAX_ROUNDS times while something fails; return the check of each rank's best result."""
    rounds: list[list[Measured]] = []
    while True:
        rounds.append(measure())
        findings = check([combine(of_rank) for of_rank in zip(*rounds, strict=True)])
        if len(rounds) == MAX_ROUNDS or all(finding.level != "FAIL" for finding in findings):
            return findings
