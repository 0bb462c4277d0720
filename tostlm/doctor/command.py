"""What `tostlm doctor` does."""

from __future__ import annotations

import json
from pathlib import Path

from tostlm.config import RunConfig
from tostlm.doctor.examine import examine, measures
from tostlm.doctor.finding import complaint, report
from tostlm.doctor.meeting import Coordinator
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically
from tostlm.launch import RankInfo


def doctor(config: RunConfig, ranks: RankInfo, timeout_seconds: float, out: Path | None) -> None:
    """Examine what a run of this config on these ranks would meet; every rank calls it.

    Rank 0 prints a line a check as it is made, and writes them to `out` as JSON too.

    Raises:
        UserError: on rank 0, a check fails; elsewhere, rank 0 is silent.
    """
    if out and ranks.rank == 0:
        require_file_writable(out)
    meeting = Coordinator(ranks, timeout_seconds)
    if ranks.rank:
        meeting.serve(measures(config, meeting))
        return
    findings = []
    for finding in examine(config, meeting):
        print(finding.line(), flush=True)
        findings.append(finding)
    if out:
        write_atomically(out, json.dumps(report(findings, meeting.hosts), indent=2) + "\n")
    if failures := complaint(findings):
        raise UserError(failures)
