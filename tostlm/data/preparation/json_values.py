"""The values of a .json file, read a piece at a time: the elements of an array, or values one after another."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase

PIECE_BYTES = 1 << 18  # read at once, more for a value that is longer
SPACE = re.compile(r"[ \t\r\n]*")
LONG_INT_DIGITS = 4000  # Python refuses to read longer ones as integers
LONGEST_TOKEN = 16  # characters of a number's end, a literal or an escape that a piece may cut


class JSONDamage(ValueError):
    """A file's content is no JSON from some place on."""


def read_json_values(file: BufferedIOBase, largest: int) -> Iterator[object]:
    """Yield the elements of the array that a file holds, or else its values, as `json.loads` makes them.

    Bytes that are no UTF-8 become surrogates, which no valid text has.

    Raises:
        JSONDamage: the file is cut short, what follows is no JSON, or a value has more than about `largest` bytes.
            Nothing of the file can be found after that.
    """
    source = _Source(file, largest)
    if not source.skip_space():
        return
    in_array = source.take("[")
    if in_array and source.skip_space() and source.take("]"):
        source.require_end()
        return
    number = 0
    while source.skip_space():
        yield source.value(number)
        number += 1
        if not in_array:
            continue
        if not source.skip_space():
            break
        if source.take("]"):
            source.require_end()
            return
        if not source.take(","):
            raise JSONDamage(f"no comma after value {number - 1}")
    if in_array:
        raise JSONDamage(f"the array does not end after value {number - 1}")


def _number(digits: str) -> float:
    return int(digits) if len(digits) < LONG_INT_DIGITS else float(digits)


class _Source:
    """The part of a file's text that is being read."""

    def __init__(self, file: BufferedIOBase, largest: int) -> None:
        self._file, self._largest = file, largest
        self._decode = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape").decode
        self._parse = json.JSONDecoder(parse_int=_number).raw_decode
        self._text, self._at, self._ended = "", 0, False

    def skip_space(self) -> bool:
        """Go to the next character that is no space; return whether there is one."""
        while True:
            space = SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return True
            if not self._read(PIECE_BYTES):
                return False

    def take(self, character: str) -> bool:
        """Go past the next character if it is this one."""
        found = self._text.startswith(character, self._at)
        self._at += found
        return found

    def require_end(self) -> None:
        if self.skip_space():
            raise JSONDamage("something follows the array")

    def value(self, number: int) -> object:
        """Return the value that begins here; `number` is for errors."""
        size = PIECE_BYTES
        while True:
            try:
                value, end = self._parse(self._text, self._at)
                # A number may go on after what was read of it.
                if self._ended or isinstance(value, dict | list | str) or end + LONGEST_TOKEN < len(self._text):
                    self._at = end
                    return value
                self._read(size)
            except RecursionError:
                raise JSONDamage(f"value {number} is nested too deeply") from None
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self._text) - LONGEST_TOKEN
                if not cut or not self._read(size):
                    raise JSONDamage(f"value {number} is no JSON: {error.msg}") from None
            if len(self._text) - self._at > 2 * self._largest + PIECE_BYTES:
                raise JSONDamage(f"value {number} is larger than {self._largest} bytes or has no end") from None
            size *= 2  # so that a long value is parsed a few times only

    def _read(self, size: int) -> bool:
        """Append about `size` bytes of text, and return whether there were any."""
        if self._ended:
            return False
        piece = self._file.read1(size)  # which gives what there is before it raises
        self._ended = not piece
        self._text, self._at = self._text[self._at :] + self._decode(piece, final=self._ended), 0
        return True
