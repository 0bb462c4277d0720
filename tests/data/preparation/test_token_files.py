"""Token files of other programs yield their documents; damaged ones raise a UserError and nothing else."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tostlm.data.preparation.token_files
from tostlm.data.preparation.token_files import megatron_documents, nanogpt_documents
from tostlm.errors import UserError

VOCAB, EOS = 100, 7
TOKENS = st.lists(st.integers(0, VOCAB - 1).filter(lambda token: token != EOS), min_size=1, max_size=20)
DOCUMENTS = st.lists(TOKENS, min_size=1, max_size=8)
CODES = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 8: "u2"}
fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_nanogpt(path: Path, documents: list[list[int]], end: bool = True) -> None:
    ids = [token for document in documents for token in [*document, EOS]]
    path.write_bytes(b"".join(struct.pack("<H", token) for token in (ids if end else ids[:-1])))


def write_megatron(
    prefix: Path, documents: list[list[list[int]]], code: int = 8, end: bool = True, modes: bool = False
) -> None:
    """Documents of sequences, as Megatron's preprocess_data.py writes them, with or without --append-eod."""
    content, sizes, pointers, bounds = b"", [], [], [0]
    for document in documents:
        for number, sequence in enumerate(document):
            last = end and number == len(document) - 1
            ids = np.array([*sequence, EOS] if last else sequence, "<" + CODES[code])
            sizes.append(len(ids))
            pointers.append(len(content))
            content += ids.tobytes()
        bounds.append(len(sizes))
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sizes), len(bounds))
    index += struct.pack(f"<{len(sizes)}i", *sizes)
    index += struct.pack(f"<{len(pointers)}q", *pointers)
    index += struct.pack(f"<{len(bounds)}q", *bounds)
    index += bytes(len(sizes)) if modes else b""
    prefix.with_name(prefix.name + ".idx").write_bytes(index)
    prefix.with_name(prefix.name + ".bin").write_bytes(content)


def listed(documents: Iterator[np.ndarray]) -> list[list[int]]:
    found = []
    for document in documents:
        assert document.dtype == np.int64
        assert document.ndim == 1
        found.append(document.tolist())
    return found


def nanogpt(path: Path) -> list[list[int]]:
    return listed(nanogpt_documents(path, EOS, VOCAB))


def megatron(prefix: Path) -> list[list[int]]:
    return listed(megatron_documents(prefix, EOS, VOCAB))


@fuzz
@given(documents=DOCUMENTS, end=st.booleans(), chunk=st.integers(1, 50))
def test_nanogpt_round_trip(tmp_path: Path, documents: list[list[int]], end: bool, chunk: int) -> None:
    write_nanogpt(tmp_path / "train.bin", documents, end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tostlm.data.preparation.token_files, "CHUNK", chunk)
        assert nanogpt(tmp_path / "train.bin") == documents


@fuzz
@given(
    documents=st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=6),
    code=st.sampled_from([*CODES]),
    end=st.booleans(),
    modes=st.booleans(),
    chunk=st.integers(1, 5),
)
def test_megatron_round_trip(
    tmp_path: Path, documents: list[list[list[int]]], code: int, end: bool, modes: bool, chunk: int
) -> None:
    write_megatron(tmp_path / "my.corpus_text_document", documents, code, end, modes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tostlm.data.preparation.token_files, "CHUNK", chunk)
        found = megatron(tmp_path / "my.corpus_text_document")
    assert found == [[token for sequence in document for token in sequence] for document in documents]


def test_the_end_of_document_token_ends_a_document_wherever_it_is(tmp_path: Path) -> None:
    """In front of each document, as llm.c writes it; twice; and in the middle of what Megatron calls a document."""
    ids = [EOS, 1, 2, EOS, EOS, 3]
    (tmp_path / "train.bin").write_bytes(np.array(ids, "<u2").tobytes())
    assert nanogpt(tmp_path / "train.bin") == [[1, 2], [3]]
    write_megatron(tmp_path / "corpus", [[ids], [[]], [[4]]])
    assert megatron(tmp_path / "corpus") == [[1, 2], [3], [4]]


def only_documents_or_a_user_error(read: Callable[[Path], list[list[int]]], path: Path) -> bool:
    """Whether there were documents."""
    try:
        found = read(path)
    except UserError as error:
        assert "\n" not in str(error)
        return False
    assert all(0 <= token < VOCAB and token != EOS for document in found for token in document)
    return True


@fuzz
@given(data=st.data(), documents=DOCUMENTS)
def test_nanogpt_fuzzed(tmp_path: Path, data: st.DataObject, documents: list[list[int]]) -> None:
    path = tmp_path / "train.bin"
    write_nanogpt(path, documents)
    path.write_bytes(damaged(data, path.read_bytes()))
    only_documents_or_a_user_error(nanogpt, path)


@settings(fuzz, max_examples=500)
@given(data=st.data(), documents=st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=6))
def test_megatron_fuzzed(tmp_path: Path, data: st.DataObject, documents: list[list[list[int]]]) -> None:
    write_megatron(tmp_path / "corpus", documents)
    path = tmp_path / data.draw(st.sampled_from(["corpus.idx", "corpus.bin"]))
    before = path.read_bytes()
    path.write_bytes(damaged(data, before))
    whole = only_documents_or_a_user_error(megatron, tmp_path / "corpus")
    assert len(path.read_bytes()) == len(before) or not whole  # what is missing is always missed


def damaged(data: st.DataObject, content: bytes) -> bytes:
    """Cut short, or with some bytes changed."""
    if data.draw(st.booleans(), "cut"):
        return content[: data.draw(st.integers(0, len(content) - 1))]
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    return bytes(changed)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has 0 bytes"),
        (b"\1\0\2", "has 3 bytes; a file of uint16 tokens has an even number"),
        (b"\1\0\x64\0", "holds token 100, outside the vocabulary of 100"),
    ],
)
def test_nanogpt_that_is_none(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=words):
        nanogpt(tmp_path / "train.bin")


@pytest.mark.parametrize(
    ("at", "format_", "value", "words"),
    [
        (0, "<B", 0, "does not begin as an index of Megatron-LM"),
        (9, "<Q", 2, "is of version 2, this tostlm reads 1"),
        (17, "<B", 6, "has dtype code 6, no integers"),
        (17, "<B", 9, "has dtype code 9"),
        (18, "<Q", 0, "says there are 0 sequences"),
        (18, "<Q", 2**64 - 1, r"has 94 bytes, its header says \d{20}"),
        (26, "<Q", 5, "has 94 bytes, its header says 110"),
        (34, "<i", -1, "sequences do not lie one after another"),
        (54, "<q", 9999, "sequences do not lie one after another"),
        (42, "<i", 5, "corpus.bin has 16 bytes, .* says 18"),
        (70, "<q", 1, "document indices go from 1 to 3, not from 0 to its 3 sequences"),
        (78, "<q", -1, "document indices do not ascend"),
        (78, "<q", 2**63 - 1, "document indices do not ascend"),
        (86, "<q", 2, "document indices go from 0 to 2, not from 0 to its 3 sequences"),
    ],
)
def test_an_index_with_one_wrong_number(tmp_path: Path, at: int, format_: str, value: int, words: str) -> None:
    write_megatron(tmp_path / "corpus", [[[1, 2], [3]], [[4, 5, 6]]])
    path = tmp_path / "corpus.idx"
    content = bytearray(path.read_bytes())
    assert len(content) == 94
    struct.pack_into(format_, content, at, value)
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        megatron(tmp_path / "corpus")


def test_files_that_are_missing(tmp_path: Path) -> None:
    for read in (nanogpt, megatron):
        with pytest.raises(UserError, match="is no file; check the path"):
            read(tmp_path / "nowhere")
    write_megatron(tmp_path / "corpus", [[[1]]])
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(UserError, match=r"corpus\.bin is no file"):
        megatron(tmp_path / "corpus")


def test_a_wrong_document_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tostlm.data.preparation.token_files, "LONGEST", 10)
    monkeypatch.setattr(tostlm.data.preparation.token_files, "CHUNK", 4)
    (tmp_path / "train.bin").write_bytes(np.full(1000, 3, "<u2").tobytes())
    write_megatron(tmp_path / "corpus", [[[3] * 1000]])
    for read, path in ((nanogpt, "train.bin"), (megatron, "corpus")):
        with pytest.raises(UserError, match="has a document of over 10 tokens"):
            read(tmp_path / path)
