"""Whether a job that ended is started again, as a function of how its starts ended."""

from pathlib import Path

import pytest

from tostlm.slurm.history import ENDED, STARTED, SUBMITTED, JobHistory, StartResult
from tostlm.slurm.restart_policy import RestartDecision, decide_restart


def decide(*codes_and_steps: tuple[int, int]) -> RestartDecision:
    return decide_restart([StartResult(*each) for each in codes_and_steps])


def test_a_finished_run_and_a_user_error_do_not_restart() -> None:
    assert not decide((0, 10)).restart
    assert not decide((2, 10)).restart
    assert not decide((75, 5), (2, 5)).restart


def test_a_stopped_job_restarts_at_once_while_it_makes_progress() -> None:
    assert decide(*((75, step) for step in range(50)))[:2] == (True, 0)
    assert decide((75, 5), (75, 5)).restart
    stuck = decide((75, 4), (75, 5), (75, 5), (75, 5))
    assert not stuck.restart and "none of its last 3 starts got beyond step 5" in stuck.reason


def test_a_bug_restarts_once() -> None:
    assert decide((1, 5)).restart
    assert not decide((1, 5), (1, 5)).restart
    assert decide((1, 5), (1, 6)).restart
    assert not decide((1, 5), (75, 5), (1, 5)).restart  # a time limit in between does not reset the count
    assert decide((76, 5), (1, 5)).restart


def test_lost_ranks_restart_with_growing_delays() -> None:
    delays = []
    results = [(76, 3)]
    for _ in range(6):
        results.append((137, 5))
        decision = decide(*results)
        delays.append(decision.delay_seconds)
    assert delays == [0, 10, 20, 40, 80, 0]
    assert not decision.restart and "none of its last 6 starts got beyond step 5" in decision.reason
    assert decide(*results, (76, 6))[:2] == (True, 0)


def test_a_start_without_an_end_counts_as_a_lost_rank(tmp_path: Path) -> None:
    history = JobHistory(tmp_path)
    history.add(STARTED, "7", step=0)
    history.add(STARTED, "8", step=0)
    history.add(ENDED, "8", exit_code=75, step=3)
    history.add(STARTED, "7", step=2)
    history.add(ENDED, "7", exit_code=0, step=9)
    assert history.start_results("7") == [StartResult(76, 2), StartResult(0, 9)]
    assert history.start_results("8") == [StartResult(75, 3)]
    assert history.jobs() == ["7", "8"]


def test_the_jobs_of_a_chain_are_judged_together(tmp_path: Path) -> None:
    """Otherwise a run that is stuck would restart for ever, as each job of a chain would count its own starts only."""
    history = JobHistory(tmp_path)
    history.add(SUBMITTED, "1")
    for job in ("2", "3"):
        history.add(SUBMITTED, job, after=str(int(job) - 1))
    for job in ("1", "2", "3"):
        history.add(STARTED, job, step=4)
        history.add(ENDED, job, exit_code=75, step=4)
    restarts = [decide_restart(history.start_results(job)).restart for job in ("1", "2", "3")]
    assert restarts == [True, True, False]


def test_a_truncated_line_is_skipped(tmp_path: Path) -> None:
    history = JobHistory(tmp_path)
    history.add(STARTED, "7", step=0)
    with (history.folder / "jobs.jsonl").open("a") as file:
        file.write('{"event": "en\n')
    history.add(ENDED, "7", exit_code=1, step=0)
    assert history.start_results("7") == [StartResult(1, 0)]


@pytest.mark.parametrize("code", [1, 75, 76, 137])
def test_every_reason_names_the_step(code: int) -> None:
    assert "step 12" in decide((code, 12)).reason
