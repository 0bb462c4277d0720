"""Documents are kept or dropped by the rules, and every dropped one is counted."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tostlm.data.preparation.readers import RecordError, Records
from tostlm.data.preparation.selection import Condition, Selection, Selector, documents
from tostlm.errors import UserError

Row = Mapping[str, object] | RecordError
ROWS: list[Row] = [
    {"text": "one", "id": "a", "language": "en", "score": 0.9, "meta": {"source": "web", "deep": {"er": 1}}},
    {"text": "", "id": "b", "language": "en", "score": 0.9, "meta": {"source": None, "deep": {"er": None}}},
    {"text": "a longer text", "id": "c", "language": "de", "score": 0.5, "meta": {"source": None, "deep": {"er": 1}}},
    {"text": "three", "id": "d", "language": None, "score": 0.8, "meta": {"source": None, "deep": {"er": 0}}},
    {"text": "four", "id": "e", "language": "fr", "score": 1, "meta": {"source": 3, "deep": {"er": 2}}},
]


def select(*rows: Row, **options: Any) -> tuple[list[str], dict[str, int], Selector]:
    selector = Selector(Selection(**options))
    found = list(selector.documents(Records(str(n), None, [row]) for n, row in enumerate(rows)))
    return found, dict(selector.dropped), selector


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        ("language=en", ["one"]),
        ("language = en,fr", ["one", "four"]),
        ("language!=en", ["a longer text", "four"]),
        ("language!=en, de", ["four"]),
        ("score>=0.9", ["one", "four"]),
        ("score>0.9", ["four"]),
        ("score<=0.5", ["a longer text"]),
        ("score<0.9", ["a longer text", "three"]),
        ("score=1", ["four"]),
        ("id>=c", ["a longer text", "three", "four"]),
        ("score=en", []),
        ("language>=3", []),
        ("meta.source=web", ["one"]),
        ("meta.deep.er>1", ["four"]),
    ],
)
def test_conditions(rule: str, kept: list[str]) -> None:
    found, dropped, _ = select(*ROWS, keep=(rule,))
    assert found == kept
    assert dropped.get(f"not {rule}", 0) == 4 - len(kept)
    assert dropped["empty"] == 1


def test_lengths_and_several_reasons() -> None:
    found, dropped, selector = select(
        *ROWS, min_characters=4, max_characters=6, keep=("score>=0.8", "language!=fr"), id_column="id"
    )
    assert found == []
    assert dropped == {
        "empty": 1,
        "below 4 characters": 1,
        "above 6 characters": 1,
        "not language!=fr": 2,
    }
    assert selector.examples[0] == {"reason": "below 4 characters", "document": "0 (a)", "detail": ""}


PROBLEMS: list[tuple[Row, str]] = [
    (RecordError("unreadable record", "is no JSON: x"), "unreadable record"),
    ({"body": "x"}, "no such column"),
    ({"text": None}, "no text"),
    ({"text": 3}, "no text"),
    ({"text": b"bytes"}, "no text"),
    ({"text": "\ud800"}, "invalid UTF-8"),
    ({"text": "\u00fc" * 51}, "record too large"),
]


@pytest.mark.parametrize(("row", "reason"), PROBLEMS)
def test_bad_records_fail_or_are_counted(row: Row, reason: str) -> None:
    good = {"text": "good"}
    with pytest.raises(UserError, match=r"^1: .*--on-error skip"):
        select(good, row, good, max_document_bytes=100)
    found, dropped, selector = select(good, row, good, max_document_bytes=100, on_error="skip")
    assert found == ["good", "good"]
    assert dropped == {reason: 1}
    assert selector.examples[0].items() >= {"reason": reason, "document": "1"}.items()


@given(st.lists(st.sampled_from([row for row, _ in PROBLEMS] + ROWS), max_size=30))
def test_every_record_is_kept_or_counted(rows: list[Row]) -> None:
    found, dropped, _ = select(*rows, on_error="skip", max_document_bytes=100)
    assert len(found) + sum(dropped.values()) == len(rows)


@pytest.mark.parametrize("rule", ["", "language", "=en", "score>=", ">3"])
def test_no_condition(rule: str) -> None:
    with pytest.raises(UserError, match="is not COLUMN RELATION VALUE"):
        Condition.parse(rule)


def test_the_column_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "url": "y"}) + "\n")
    with pytest.raises(UserError, match="has no column 'id', only text, url"):
        list(documents([str(tmp_path)], Selection(id_column="id")))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_without_the_column_of_a_condition_does_not_meet_it(tmp_path: Path, kind: str) -> None:
    rows = [{"text": "x", "score": 2}, {"text": "y"}, {"text": "z", "score": 0}]
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        for n, row in enumerate(rows):
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / f"{n}.parquet")
    for rule, kept in (("score>1", ["x"]), ("score!=2", ["z"]), ("score=2,0", ["x", "z"])):
        dropped: Counter[str] = Counter()
        assert list(documents([str(tmp_path)], Selection(keep=(rule,)), dropped)) == kept
        assert dropped == {f"not {rule}": 3 - len(kept)}
    with pytest.raises(UserError, match=r"no document of \S+ is left; dropped: 3 not score>9"):
        list(documents([str(tmp_path)], Selection(keep=("score>9",))))


def test_an_error_is_one_line_whatever_a_record_holds() -> None:
    selector = Selector(Selection(id_column="id"))
    with pytest.raises(UserError, match=r"^a \(1 2\): has no column 'text', only id, b c;"):
        list(selector.documents([Records("a", None, [{"id": "1\n2", "b\nc": 3}])]))
