"""`tostlm doctor`: which checks are made, in which order, and what happens when ranks do not answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tostlm.config import RunConfig, matmul_dtype
from tostlm.doctor import hardware, network, run_inputs
from tostlm.doctor.coordinator import Coordinator, DoctorAborted, Measure, join_group
from tostlm.doctor.findings import Finding, Speed, build_report, summarize_failures
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically
from tostlm.launch import RankInfo

MAX_ROUNDS = 3  # of a measurement that fails: one pass shows that the failure was a disturbance


def run_doctor(config: RunConfig, rank_info: RankInfo, timeout_seconds: float, out: Path | None) -> None:
    """Check what a run of this config on these ranks would meet. Every rank calls this.

    Rank 0 prints a line for each check as it is made, and writes them all to `out`, a .json file. A rank that does not
    answer within `timeout_seconds` is unhealthy.

    Raises:
        UserError: on rank 0, a check fails; elsewhere, rank 0 does not answer.
    """
    if out and rank_info.rank == 0:
        require_file_writable(out)
    coordinator = Coordinator(config, rank_info, timeout_seconds)
    if rank_info.rank:
        coordinator.serve()
        return
    findings = []
    for finding in _examine(config, coordinator):
        print(finding.format_line(), flush=True)
        findings.append(finding)
    if out:
        write_atomically(out, json.dumps(build_report(findings, coordinator.hosts), indent=2) + "\n")
    if failures := summarize_failures(findings):
        raise UserError(failures)


def _examine(config: RunConfig, coordinator: Coordinator) -> Iterator[Finding]:
    """Make all checks on rank 0. Collectives come last: a failure there ends the examination."""
    try:
        coordinator.gather_hosts()
        yield from _check_each_rank(config, coordinator)
        yield from _check_collectives(coordinator)
    except DoctorAborted as aborted:
        yield aborted.finding
    coordinator.end()


def _check_each_rank(config: RunConfig, coordinator: Coordinator) -> Iterator[Finding]:
    ask, hosts = coordinator.ask, coordinator.hosts
    yield run_inputs.check_versions(ask("versions", run_inputs.measure_versions), hosts)
    devices = ask("devices", hardware.measure_device)
    yield hardware.check_devices(devices, hosts)
    yield run_inputs.check_config(config, devices, hosts)
    check_gemms = partial(hardware.check_gemms, matmul_dtype(config))
    yield from _check_speeds(coordinator, "gemm", hardware.measure_gemm, check_gemms)
    try:
        with run_inputs.marked_run_dir(config.run_dir):
            yield run_inputs.check_disk(coordinator.ask_hosts("disk", run_inputs.measure_disk), config, hosts)
    except (UserError, OSError) as error:
        yield Finding("disk", "FAIL", str(error))
    data = coordinator.ask_hosts("data", run_inputs.measure_data)
    yield run_inputs.check_data(data, hosts)
    if not any(each.error for each in data.values()):
        yield run_inputs.check_resume(config)


def _check_collectives(coordinator: Coordinator) -> Iterator[Finding]:
    ask, hosts = coordinator.ask, coordinator.hosts
    ask("connect", partial(join_group, coordinator.timeout_seconds))
    yield network.check_all_reduces(ask("all-reduce", network.measure_all_reduce), hosts)
    if len(hosts) > 1:
        yield from _check_speeds(coordinator, "ring", network.measure_link, network.check_links)
        yield network.check_clocks(ask("clock", network.measure_clock), hosts)


def _check_speeds(
    coordinator: Coordinator,
    question: str,
    measure: Measure[Speed],
    check: Callable[[Sequence[Speed], Sequence[str]], list[Finding]],
) -> list[Finding]:
    """Measure all ranks up to MAX_ROUNDS times while something fails; return the check of each rank's best result."""
    speeds = coordinator.ask(question, measure)
    findings = check(speeds, coordinator.hosts)
    for _ in range(MAX_ROUNDS - 1):
        if all(finding.level != "FAIL" for finding in findings):
            break
        speeds = [before.combine(now) for before, now in zip(speeds, coordinator.ask(question, measure), strict=True)]
        findings = check(speeds, coordinator.hosts)
    return findings
