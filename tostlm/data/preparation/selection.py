"""Which records become documents, and the count of those that do not, by reason."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from tostlm.data.preparation.decompression import MAX_WINDOW_BYTES
from tostlm.data.preparation.readers import Reader, RecordError, Records
from tostlm.data.preparation.sources import divide, find_sources, no_text
from tostlm.data.shards import FrozenModel
from tostlm.errors import UserError

CONDITION = re.compile(r"^\s*(?P<column>[^<>=!]+?)\s*(?P<relation>>=|<=|!=|=|>|<)\s*(?P<value>[^<>=!\s].*?)\s*$")
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
MAX_EXAMPLES = 20  # dropped documents that are named, for each reason and work unit
MAX_SHOWN = 1000  # characters of what names a document or a record
MISSING = object()


class Selection(FrozenModel):
    """Which column is the text, which documents are kept, and what happens to a record that cannot be used.

    A column inside another is named with a dot, as in metadata.language.
    """

    text_column: Annotated[str, pydantic.Field(min_length=1)] = "text"
    id_column: str | None = None  # names documents in reports
    keep: tuple[str, ...] = ()  # conditions such as language=en or score>=0.8; all must hold
    min_characters: Annotated[int, pydantic.Field(ge=0)] = 1
    max_characters: int | None = None
    # SentencePiece takes 40 bytes of memory for each of a text.
    max_document_bytes: Annotated[int, pydantic.Field(ge=1, le=1 << 40)] = 16_000_000
    max_window_bytes: Annotated[int, pydantic.Field(ge=1 << 20, le=1 << 32)] = MAX_WINDOW_BYTES  # of a decompressor
    on_error: Literal["fail", "skip"] = "fail"


class Condition(NamedTuple):
    """A rule about one column, COLUMN RELATION VALUE; `=` and `!=` take several values with commas between.

    Numbers compare with numbers and text with text; a value that is missing or of another type meets no condition.
    """

    rule: str
    column: str
    relation: str
    values: list[object]

    @classmethod
    def parse(cls, rule: str) -> Condition:
        """Return the condition that a rule such as language=en,de or score>=0.8 means.

        Raises:
            UserError: the rule is not COLUMN RELATION VALUE.
        """
        match = CONDITION.match(rule)
        if match is None:
            raise UserError(f"condition {rule!r} is not COLUMN RELATION VALUE, as in language=en,de or score>=0.8")
        column, relation, value = match["column"], match["relation"], match["value"]
        values = value.split(",")
        if len(values) > 1 and relation not in ("=", "!="):
            raise UserError(f"condition {rule!r} compares with several values, which only = and != do")
        return cls(rule, column, relation, [_literal(text.strip()) for text in values])

    def holds(self, row: Mapping[str, object]) -> bool:
        """Return whether a row meets the condition."""
        found = value_of(row, self.column)
        relation = RELATIONS[self.relation]
        results = [_comparable(found, value) and relation(found, value) for value in self.values]
        return all(results) if self.relation == "!=" else any(results)


class Selector:
    """Turns records into documents.

    `dropped` counts the other records by reason, `examples` holds reason, document and detail of the first of each
    reason, and `columns` are the columns that are read.

    Raises:
        UserError: a condition of the selection has not the form of one.
    """

    def __init__(self, selection: Selection) -> None:
        self._selection = selection
        self._conditions = [Condition.parse(rule) for rule in selection.keep]
        self.dropped: Counter[str] = Counter()
        self.examples: list[dict[str, str]] = []
        self._required = [column for column in (selection.id_column, selection.text_column) if column]
        self.columns = list(dict.fromkeys([*self._required, *(c.column for c in self._conditions)]))

    def documents(self, records: Iterable[Records]) -> Iterator[str]:
        """Yield the texts of the documents that are kept, in order.

        Raises:
            UserError: a record cannot be used, and the selection's `on_error` is "fail".
        """
        id_column = self._selection.id_column
        for some in records:
            for index, row in enumerate(some.rows):
                if row is None:
                    continue
                text = row if isinstance(row, RecordError) else self._text(row)
                if isinstance(text, str):
                    yield text
                else:
                    place = some.place(index)
                    if id_column is not None and not isinstance(row, RecordError):
                        place = f"{place} ({value_of(row, id_column)})"
                    self._leave_out(place, *text)

    def _text(self, row: Mapping[str, object]) -> str | RecordError:
        text_column, limit = self._selection.text_column, self._selection.max_document_bytes
        text: object = MISSING
        for column in self._required:  # the text's comes last
            text = value_of(row, column)
            if text is MISSING:
                hint = "; choose with --text-column" if column == text_column else ""
                return RecordError("no such column", f"has no column {column!r}, only {', '.join(row)}{hint}")
        if not isinstance(text, str):
            return RecordError("no text", f"{text_column} is {text!r:.40}, not text")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            return RecordError("invalid UTF-8", f"{text_column} holds half of a surrogate pair: {error}")
        if size > limit:
            detail = f"{text_column} has {size} bytes, --max-document-bytes allows {limit}"
            return RecordError("record too large", detail)
        reason = self._reason_to_drop(row, text)
        return RecordError(reason, "") if reason else text

    def _reason_to_drop(self, row: Mapping[str, object], text: str) -> str | None:
        shortest, longest = self._selection.min_characters, self._selection.max_characters
        if not text:
            return "empty"
        if len(text) < shortest:
            return f"below {shortest} characters"
        if longest is not None and len(text) > longest:
            return f"above {longest} characters"
        for condition in self._conditions:
            if not condition.holds(row):
                return f"not {condition.rule}"
        return None

    def _leave_out(self, place: str, reason: str, error: str) -> None:
        if error and self._selection.on_error == "fail":
            problem = f"{_shown(place)}: {_shown(error)}"
            raise UserError(
                f"{' '.join(problem.splitlines())}; correct it, or leave such records out with --on-error skip"
            )
        self.dropped[reason] += 1
        if self.dropped[reason] <= MAX_EXAMPLES:
            self.examples.append({"reason": reason, "document": _shown(place), "detail": _shown(error)})


def _shown(text: str) -> str:
    """Return a text of any content as a file takes it: an id may hold half of a surrogate pair, or megabytes."""
    return text.encode(errors="backslashreplace").decode()[:MAX_SHOWN]


def value_of(row: Mapping[str, object], column: str) -> object:
    """Return a row's value in a column, or inside one if the name has dots; MISSING if there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    found = row.get(outer) if dot else None
    return value_of(found, inner) if isinstance(found, Mapping) else MISSING


def _literal(text: str) -> object:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | str) else text


def _comparable(found: object, value: object) -> bool:
    number = (int, float)  # bool among them
    return isinstance(found, number) == isinstance(value, number) and isinstance(found, str) == isinstance(value, str)


def nothing_left(sources: Sequence[str], dropped: Mapping[str, int]) -> UserError:
    return UserError(f"no document of {', '.join(sources)} is left; dropped: {format_counts(dropped)}")


def format_counts(dropped: Mapping[str, int]) -> str:
    """Return counts of dropped documents, by reason, as one line."""
    return ", ".join(f"{count:,} {reason}" for reason, count in sorted(dropped.items()) if count) or "none"


def documents(
    sources: Sequence[str], selection: Selection | None = None, dropped: Counter[str] | None = None
) -> Iterator[str]:
    """Yield the texts of several sources in order; files are read as the texts are consumed.

    `dropped` counts what is left out, by reason, as far as the sources are read.

    Raises:
        UserError: a source is missing, unreadable or without text, or a record cannot be used.
    """
    selection = selection or Selection()
    for source in find_sources(sources):
        selector, empty = Selector(selection), True
        if dropped is not None:
            selector.dropped = dropped
        before = selector.dropped.copy()
        for unit in divide([source]):
            reader = Reader(unit, selector.columns, selection.max_document_bytes, selection.max_window_bytes)
            for text in selector.documents(reader):
                empty = False
                yield text
        if empty:
            left_out = selector.dropped - before
            raise nothing_left([source.name], left_out) if left_out else no_text(source.name)
