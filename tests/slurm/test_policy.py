"""Whether a job that ended is started again: a function of how its starts ended."""

from pathlib import Path

import pytest

from tostlm.slurm.history import ENDED, STARTED, SUBMITTED, End, JobHistory
from tostlm.slurm.policy import Decision, decide


def ends(*codes_and_steps: tuple[int, int]) -> Decision:
    return decide([End(*each) for each in codes_and_steps])


def test_what_is_finished_or_a_users_mistake_is_left() -> None:
    assert not ends((0, 10)).again
    assert not ends((2, 10)).again
    assert not ends((75, 5), (2, 5)).again


def test_what_was_asked_to_stop_goes_on_at_once_while_it_comes_further() -> None:
    assert ends(*((75, step) for step in range(50)))[:2] == (True, 0)
    assert ends((75, 5), (75, 5)).again
    stuck = ends((75, 4), (75, 5), (75, 5), (75, 5))
    assert not stuck.again and "none of its last 3 starts came beyond step 5" in stuck.why


def test_a_defect_is_tried_once_more() -> None:
    assert ends((1, 5)).again
    assert not ends((1, 5), (1, 5)).again
    assert ends((1, 5), (1, 6)).again
    assert not ends((1, 5), (75, 5), (1, 5)).again  # a time limit between them changes nothing
    assert ends((76, 5), (1, 5)).again


def test_lost_ranks_are_tried_again_later_and_later() -> None:
    delays = []
    history = [(76, 3)]
    for _ in range(6):
        history.append((137, 5))
        decision = ends(*history)
        delays.append(decision.delay_seconds)
    assert delays == [0, 10, 20, 40, 80, 0]
    assert not decision.again and "none of its last 6 starts came beyond step 5" in decision.why
    assert ends(*history, (76, 6))[:2] == (True, 0)


def test_a_start_that_its_node_took_with_it_is_a_lost_rank(tmp_path: Path) -> None:
    record = JobHistory(tmp_path)
    record.add(STARTED, "7", step=0)
    record.add(STARTED, "8", step=0)
    record.add(ENDED, "8", code=75, step=3)
    record.add(STARTED, "7", step=2)
    record.add(ENDED, "7", code=0, step=9)
    assert record.ends("7") == [End(76, 2), End(0, 9)]
    assert record.ends("8") == [End(75, 3)]
    assert record.jobs() == ["7", "8"]


def test_a_chain_is_judged_as_one_job(tmp_path: Path) -> None:
    """Else each of its jobs would have a history of its own, and one that cannot come further would go on for ever."""
    record = JobHistory(tmp_path)
    record.add(SUBMITTED, "1")
    for job in ("2", "3"):
        record.add(SUBMITTED, job, after=str(int(job) - 1))
    for job in ("1", "2", "3"):
        record.add(STARTED, job, step=4)
        record.add(ENDED, job, code=75, step=4)
    assert [decide(record.ends(job)).again for job in ("1", "2", "3")] == [True, True, False]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    record = JobHistory(tmp_path)
    record.add(STARTED, "7", step=0)
    with (record.folder / "jobs.jsonl").open("a") as file:
        file.write('{"what": "en\n')
    record.add(ENDED, "7", code=1, step=0)
    assert record.ends("7") == [End(1, 0)]


@pytest.mark.parametrize("code", [1, 75, 76, 137])
def test_every_reason_names_the_step(code: int) -> None:
    assert "step 12" in ends((code, 12)).why
