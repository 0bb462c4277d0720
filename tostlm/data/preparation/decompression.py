"""Compressed files as streams: in bounded memory, and up to the place where they are damaged."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import zstandard

PIECE_BYTES = 1 << 18  # of content, given at once
INPUT_BYTES = 1 << 14  # compressed, read at once; zstd may make 32,768 times as much of a byte
STEP_BYTES = 1 << 10  # of these, given to zstd at once
MAX_WINDOW_BYTES = 1 << 27  # as of the zstd command; `xz -9` takes half of it
XZ_OVERHEAD_BYTES = 1 << 20  # of liblzma beside the dictionary


class WindowTooLarge(Exception):
    """A file asks its decompressor for more memory than is allowed."""


DAMAGE = (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError)  # of damaged files


class Decompressor(Protocol):
    """Decompresses one stream, as `bz2` and `lzma` of the standard library do."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


def decompressed(raw: io.BufferedIOBase, path: str, max_window: int = MAX_WINDOW_BYTES) -> io.BufferedIOBase:
    """Return a file's content as a stream, decompressed by the suffix of its name.

    All that was decompressed before a damaged place is given before reading raises one of `DAMAGE` there, as long as
    it is read by lines or with `read1`.

    Args:
        raw: the file.
        path: its name.
        max_window: bytes that a decompressor may take for what it remembers of the content.

    Raises:
        WindowTooLarge: while reading, a stream asks for more than `max_window`.
    """
    openers: dict[str, Callable[[], Decompressor]] = {
        ".gz": _Gzip,
        ".bz2": bz2.BZ2Decompressor,
        ".xz": lambda: lzma.LZMADecompressor(memlimit=max_window + XZ_OVERHEAD_BYTES),
        ".zst": lambda: _Zstandard(max_window),
    }
    opener = openers.get(Path(path.lower()).suffix)
    return io.BufferedReader(_Streams(raw, opener, max_window), PIECE_BYTES) if opener else raw


class _Streams(io.RawIOBase):
    """Compressed streams, one after another, as parallel compressors write them.

    Python's own readers take a damaged stream after the first for the end of the file, and lose what they had
    decompressed in the call that finds the damage.
    """

    def __init__(self, raw: io.BufferedIOBase, new: Callable[[], Decompressor], max_window: int) -> None:
        self._raw, self._new, self._max_window = raw, new, max_window
        self._damage: Exception | None = None  # to raise when all before it has been given
        self._input = b""
        self._begun = False
        self._begin()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0
        while filled < len(buffer) and self._damage is None:
            data = self._decompress(len(buffer) - filled)
            if data is None:
                break
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        if self._damage is not None and not filled:
            raise self._damage
        return filled

    def _begin(self) -> None:
        self._stream = self._new()
        self._start = self._raw.tell() - len(self._input)  # of the stream in the file
        self._given = 0  # bytes of its content
        self._is_first, self._begun = not self._begun, False  # `_begun`: whether it has got any input

    def _decompress(self, size: int) -> bytes | None:
        """Return up to `size` bytes of content, perhaps none yet; None at the end or where nothing is before damage."""
        if self._stream.eof:
            self._input = self._stream.unused_data
            self._begin()
        if self._stream.needs_input and not self._input:
            self._input = self._raw.read(INPUT_BYTES)
            if not self._input and (self._begun or self._is_first):
                self._damage = EOFError(
                    f"it ends {'in the middle of' if self._begun else 'without'} a compressed stream"
                )
            if not self._input:
                return None
        if not self._begun:
            padded = len(self._input)
            self._input = self._input.lstrip(b"\0")  # gzip and xz allow padding between streams
            self._start += padded - len(self._input)
            self._begun = bool(self._input)
            if not self._begun:
                return b""
        try:
            data = self._stream.decompress(self._input, size)
        except Exception as error:
            self._damage = self._explained(error)
            return self._before_damage(size)
        self._input = b""
        self._given += len(data)
        return data

    def _before_damage(self, size: int) -> bytes:
        """Return what the call for `size` bytes that found the damage had decompressed, which is lost with the error.

        The stream is decompressed again, the last of its input byte by byte. Damage that is found without new input is
        of what came since the last, which bzip2 gives before it compares its checksum.
        """
        stream, content, skip, sound = self._new(), bytearray(), self._given, 0
        end = self._raw.tell()
        self._raw.seek(self._start)
        while len(content) < size and not (stream.needs_input and self._raw.tell() == end):
            data = b""
            if stream.needs_input:
                sound = len(content)
                left = end - self._raw.tell()
                data = self._raw.read(INPUT_BYTES if left > 2 * INPUT_BYTES else 1)
            try:
                found = stream.decompress(data, min(skip, PIECE_BYTES) or 1)
            except Exception:
                break
            content += b"" if skip else found
            skip -= len(found) if skip else 0
        return bytes(content[:sound])

    def _explained(self, error: Exception) -> Exception:
        if "emory" not in str(error):  # of liblzma and zstd
            return error
        rule = f"more than the {self._max_window} bytes that --max-window-bytes allows"
        return WindowTooLarge(f"its decompressor asks for {rule}; raise it to read the file")


class _Gzip:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        self._full = False  # whether there may be more content of the same input

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data

    @property
    def needs_input(self) -> bool:
        return not (self._full or self._zlib.unconsumed_tail)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        content = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self._full = len(content) == max_length
        return content


class _Zstandard:
    """One frame; its library has no limit of content, so it gets input in small steps."""

    def __init__(self, max_window: int) -> None:
        largest = 1 << zstandard.WINDOWLOG_MAX
        self._zstd = zstandard.ZstdDecompressor(max_window_size=min(max_window, largest)).decompressobj()
        self._input = self._content = memoryview(b"")

    @property
    def eof(self) -> bool:
        return self._zstd.eof and not self._content

    @property
    def unused_data(self) -> bytes:
        return self._zstd.unused_data + bytes(self._input)

    @property
    def needs_input(self) -> bool:
        return not (self._input or self._content)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        self._input = memoryview(data) if data else self._input
        while self._input and not self._content and not self._zstd.eof:
            step, self._input = self._input[:STEP_BYTES], self._input[STEP_BYTES:]
            self._content = memoryview(self._zstd.decompress(step))
        content, self._content = self._content[:max_length], self._content[max_length:]
        return bytes(content)
