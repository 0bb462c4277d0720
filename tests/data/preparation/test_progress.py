"""The progress that a preparation prints while it runs."""

import pytest

from tostlm.data.preparation import progress
from tostlm.data.preparation.progress import ProgressBar, WorkDone


def test_a_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    clock = iter([0.0, 2.0, 2.0, 2.0, 2.0, 8.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    bar = ProgressBar([3_000_000, 1_000_000])
    bar.add(WorkDone(source_bytes=1_000_000, documents=1000, tokens=250_000, text_bytes=900_000))
    said = capsys.readouterr()
    assert said.out == "prepare: 1,000 documents, 250,000 tokens, 0.5 MB/s, 2 s, 25%, 6 s left\n"
    assert not said.err
    bar.close()
    assert capsys.readouterr().out == "prepare: 1,000 documents, 250,000 tokens, 0.1 MB/s, 8 s\n"


def test_a_hub_does_not_say_how_much_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", -1)
    ProgressBar([None]).add(WorkDone(documents=1, tokens=2, text_bytes=3))
    assert "left" not in capsys.readouterr().out
