"""Folders and globs name each file once, through links too, and no file of another program's own."""

import json
import os
from pathlib import Path

import datasets
import pytest

from tostlm.data import documents
from tostlm.errors import UserError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two files, a folder elsewhere that a link leads to, two links that make loops, hidden files and folders."""
    root = tmp_path / "data"
    write(root / "a.jsonl", "a")
    write(root / "deep" / "b.jsonl", "b")
    write(tmp_path / "elsewhere" / "c.jsonl", "c")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "loop").symlink_to(root)
    (root / "deep" / "back").symlink_to("..")
    (root / "again.jsonl").symlink_to("a.jsonl")
    os.link(root / "deep" / "b.jsonl", root / "deep" / "hard.jsonl")
    for hidden in (".a.jsonl", ".ipynb_checkpoints/a.jsonl", "deep/.git/a.jsonl", ".cache/a.jsonl"):
        write(root / hidden, "hidden")
    (root / "README.md").write_text("no document")
    return root


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("", "abc"),
        ("/", "abc"),
        ("/loop/deep/back", "abc"),
        ("/**/*.jsonl", "abc"),
        ("/**/**/*.json[l]", "abc"),
        ("/*/*.jsonl", "bca"),
        ("/*/**/[ab].jsonl", "ba"),
        ("/**/deep/b.jsonl", "b"),
        ("/deep/**/*.jsonl", "abc"),
        ("/linked/**", "c"),
        ("/loop/loop/a.jsonl", "a"),
        ("/.ipynb*/*", ["hidden"]),
        ("/.*.jsonl", ["hidden"]),
        ("/.cache", ["hidden"]),
    ],
)
def test_each_file_is_named_once(tree: Path, source: str, texts: list[str] | str) -> None:
    assert sorted(documents([f"{tree}{source}"])) == sorted(texts)


def test_relative_paths(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    for source in (".", "**/*.jsonl", "./*/../**/*.jsonl", "../data"):
        assert sorted(documents([source])) == ["a", "b", "c"], source


def test_links_into_a_store_of_contents(tmp_path: Path) -> None:
    """The Hugging Face cache names files by their hash and links to them."""
    write(tmp_path / "blobs" / "0a1b", "x")
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "x.jsonl").symlink_to("../blobs/0a1b")
    assert list(documents([str(tmp_path)])) == ["x"]


def test_a_link_to_nothing(tree: Path) -> None:
    (tree / "moved").symlink_to("/nowhere")
    for source in (tree, tree / "**/*.jsonl"):
        with pytest.raises(UserError, match=r"data/moved is a link to what does not exist; correct the link"):
            list(documents([str(source)]))
    assert sorted(documents([str(tree / "deep/*.jsonl")])) == ["b"]


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("", "/a.jsonl", r"data/a\.jsonl is in two sources, \S+/data and \S+/data/a\.jsonl; name it once"),
        ("", "/", r"is in two sources, \S+/data and \S+/data/; name it once"),
        ("/a.jsonl", "/a.jsonl", r"is in two sources"),
        ("/a.jsonl", "/again.jsonl", r"data/a\.jsonl is in two sources, .* \(as \S+/again\.jsonl\); name it once"),
        ("/deep/b.jsonl", "/deep/hard.jsonl", r"b\.jsonl is in two sources, .* \(as \S+/hard\.jsonl\)"),
        ("/*.jsonl", "/../elsewhere/../data/loop", r"is in two sources"),
    ],
)
def test_a_file_in_two_sources_is_refused(tree: Path, first: str, second: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        list(documents([f"{tree}{first}", f"{tree}{second}"]))


def test_a_hub_dataset_in_two_sources_is_refused() -> None:
    with pytest.raises(UserError, match=r"o/n is in two sources, o/n and o/n@train .*name it once"):
        list(documents(["o/n", "o/n@train"]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A dataset of two shards in the folder `one`, another of two splits in `two`, as `datasets` saves them."""
    rows = datasets.Dataset.from_dict({"text": ["x", "y", "z"]})
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    rows.map(lambda row: row, cache_file_name=str(tmp_path / "one" / "cache-1.arrow"))
    datasets.DatasetDict(train=rows.select([2, 0]), test=rows.select([1])).save_to_disk(tmp_path / "two")
    return tmp_path


def test_folders_that_datasets_saved(saved: Path) -> None:
    assert list(documents([f"{saved}/one"])) == ["x", "y", "z"]
    assert list(documents([f"{saved}/o*/*"])) == ["x", "y", "z"]
    assert list(documents([f"{saved}/two/test", f"{saved}/two/train"])) == ["y", "z", "x"]
    for source in ("two", "two/**/*.arrow", "."):
        with pytest.raises(UserError, match=r"two holds the splits train, test; name the folder .* as \S+/two/train"):
            list(documents([f"{saved}/{source}"]))
    (saved / "two" / "dataset_dict.json").write_text('{"splits": ["test"]}')
    assert list(documents([f"{saved}/two"])) == ["y"]


def test_a_saved_folder_that_is_not_whole(saved: Path) -> None:
    (saved / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00001-of-00002.arrow, which state.json names, is missing; copy"):
        list(documents([f"{saved}/one"]))
    for content in ("{", "[]", "{}", '{"_data_files": [3]}', "null"):
        (saved / "one" / "state.json").write_text(content)
        with pytest.raises(UserError, match=r"state.json is damaged: .*; copy the folder again"):
            list(documents([f"{saved}/one"]))
