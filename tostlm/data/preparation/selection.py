"""Which records become documents, and what is said of the others."""

from __future__ import annotations

import json
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import pydantic

from tostlm.data.preparation.readers import Reader, RecordError, SourceRecord
from tostlm.data.preparation.sources import WorkUnit, no_text, parts_of
from tostlm.errors import UserError

CONDITION = re.compile(r"^\s*(?P<column>[^<>=!]+?)\s*(?P<relation>>=|<=|!=|=|>|<)\s*(?P<value>[^=\s].*?)\s*$")
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
EXAMPLES = 20  # places remembered of each reason, a part
MISSING = object()
MAX_DOCUMENT_BYTES = 16_000_000  # SentencePiece takes 40 bytes of memory for each of a text


class Selection(pydantic.BaseModel):
    """Which column is text, which documents are kept, and what a record that cannot be used does.

    A column inside another is named with a dot, as in metadata.language.
    """

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    text_column: str = "text"
    id_column: str | None = None  # names documents in what is reported
    keep: tuple[str, ...] = ()  # conditions such as language=en or score>=0.8; all must hold
    min_characters: Annotated[int, pydantic.Field(ge=0)] = 1
    max_characters: int | None = None
    max_document_bytes: int = MAX_DOCUMENT_BYTES
    on_error: Literal["fail", "skip"] = "fail"


class Condition(NamedTuple):
    """A rule about one column."""

    rule: str  # as it was written
    column: str
    holds: Callable[[Any], bool]


class Document(NamedTuple):
    place: str
    text: str
    data: bytes  # the text in UTF-8


class Selector:
    """Turns records into documents; `dropped` counts the others by reason, `examples` says where the first were."""

    def __init__(self, selection: Selection) -> None:
        """
        Raises:
            UserError: a condition is not one.
        """
        self._selection = selection
        self._conditions = [condition(rule) for rule in selection.keep]
        self.read = 0
        self.dropped: Counter[str] = Counter()
        self.examples: list[tuple[str, str, str]] = []  # reason, place, detail

    @property
    def columns(self) -> list[str]:
        """What is looked at of a record."""
        chosen = [self._selection.text_column, self._selection.id_column, *(c.column for c in self._conditions)]
        return list(dict.fromkeys(column for column in chosen if column))

    def documents(self, records: Iterable[SourceRecord]) -> Iterator[Document]:
        """The records that are kept, in order.

        Raises:
            UserError: a record cannot be used, and the selection's `on_error` is "fail".
        """
        for place, row in records:
            self.read += 1
            problem = row if isinstance(row, RecordError) else self._problem(row)
            name = self._name(place, row)
            if problem is not None:
                if self._selection.on_error == "fail":
                    raise UserError(f"{name}: {problem.detail}; mend it, or leave such records out by --on-error skip")
                self._drop(problem.reason, name, problem.detail)
                continue
            assert not isinstance(row, RecordError)
            text = value_of(row, self._selection.text_column)
            if reason := self._reason(row, text):
                self._drop(reason, name, "")
            else:
                yield Document(name, text, text.encode())

    def _name(self, place: str, row: Mapping[str, Any] | RecordError) -> str:
        column = self._selection.id_column
        return place if column is None or isinstance(row, RecordError) else f"{place} ({value_of(row, column)})"

    def _problem(self, row: Mapping[str, Any]) -> RecordError | None:
        for column in self.columns:
            if value_of(row, column) is MISSING:
                hint = "; choose with --text-column" if column == self._selection.text_column else ""
                return RecordError("no such column", f"has no column {column!r}, only {', '.join(row)}{hint}")
        column = self._selection.text_column
        text = value_of(row, column)
        if not isinstance(text, str):
            return RecordError("no text", f"{column} is {text!r:.40}, not text")
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            return RecordError("invalid UTF-8", f"{column} holds half of a surrogate pair: {error}")
        if size > self._selection.max_document_bytes:
            limit = self._selection.max_document_bytes
            return RecordError("record too large", f"{column} has {size} bytes, --max-document-bytes allows {limit}")
        return None

    def _reason(self, row: Mapping[str, Any], text: str) -> str | None:
        """Why a sound record is not kept; None where it is."""
        if not text:
            return "empty"
        if len(text) < self._selection.min_characters:
            return f"below {self._selection.min_characters} characters"
        if self._selection.max_characters is not None and len(text) > self._selection.max_characters:
            return f"above {self._selection.max_characters} characters"
        return next((f"not {c.rule}" for c in self._conditions if not c.holds(value_of(row, c.column))), None)

    def _drop(self, reason: str, place: str, detail: str) -> None:
        self.dropped[reason] += 1
        if self.dropped[reason] <= EXAMPLES:
            self.examples.append((reason, place, detail))


def value_of(row: Mapping[str, Any], column: str) -> Any:
    """What a row holds in a column, or inside one where the name has dots; MISSING where there is none."""
    if column in row:
        return row[column]
    outer, dot, inner = column.partition(".")
    found = row.get(outer) if dot else None
    return value_of(found, inner) if isinstance(found, Mapping) else MISSING


def condition(rule: str) -> Condition:
    """COLUMN RELATION VALUE as a condition; `=` takes several values with commas between.

    Numbers compare with numbers and text with text; a value that is missing or of another type meets no condition.

    Raises:
        UserError: the rule is not of that form.
    """
    match = CONDITION.match(rule)
    if match is None:
        raise UserError(f"condition {rule!r} is not COLUMN RELATION VALUE, as in language=en,de or score>=0.8")
    relation = RELATIONS[match["relation"]]
    equality = match["relation"] in ("=", "!=")
    values = [_literal(value) for value in (match["value"].split(",") if equality else [match["value"]])]
    every = match["relation"] == "!="

    def holds(found: Any) -> bool:
        if found is None:
            return False
        results = [_comparable(found, value) and relation(found, value) for value in values]
        return all(results) if every else any(results)

    return Condition(rule, match["column"], holds)


def _literal(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | bool | str) else text


def _comparable(found: Any, value: Any) -> bool:
    number = (int, float)  # bool among them
    return isinstance(found, number) == isinstance(value, number) and isinstance(found, str) == isinstance(value, str)


def documents(sources: list[str], selection: Selection | None = None) -> Iterator[str]:
    """The texts of every source, in order; nothing is read before the first is asked for, and files stream.

    Raises:
        UserError: a source is missing, unreadable or without text, or a record cannot be used.
    """
    selection = selection or Selection()
    for source in sources:
        empty = True
        for document in documents_of(parts_of([source]), Selector(selection), selection.max_document_bytes):
            empty = False
            yield document.text
        if empty:
            raise no_text(source)


def documents_of(parts: Iterable[WorkUnit], selector: Selector, largest: int) -> Iterator[Document]:
    for part in parts:
        yield from selector.documents(Reader(part, selector.columns, largest))
