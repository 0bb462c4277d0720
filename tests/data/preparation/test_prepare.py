"""The same shards however the work is shared out or interrupted, and nothing finished is lost."""

import errno
import inspect
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import fail, succeed, tostlm
from tests.data.test_shards import texts_of
from tests.warm import Program
from tostlm.cli.data import prepare as prepare_command
from tostlm.data import (
    VALIDATION,
    PreparationSettings,
    Tokenizer,
    load_tokenizer,
    merge,
    parse_task,
    prepare,
    read_manifest,
    train_tokenizer,
    verify,
)
from tostlm.data.preparation import dedup as dedup_module
from tostlm.data.preparation.plan import RESULT, unit_folder
from tostlm.errors import UserError
from tostlm.files import locked


@pytest.fixture
def crawl(speeches: list[str], tmp_path: Path) -> Path:
    """Files of several kinds; every third text is there twice, far apart."""
    folder = tmp_path / "crawl"
    folder.mkdir()
    rows = [json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate([*speeches, *speeches[::3]])]
    for n in range(4):
        (folder / f"{n}.jsonl").write_text("".join(rows[n::4]))
    (folder / "last.txt").write_text(speeches[1])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every byte of a prepared folder, but for the command that made it."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    manifest = json.loads(found.pop("manifest.json"))
    del manifest["command"], manifest["sha256"]
    return {**found, "manifest": json.dumps(manifest).encode()}


def all_texts(folder: Path) -> list[str]:
    splits = read_manifest(folder).splits
    return [text for name, split in splits.items() if split.documents for text in texts_of(folder, name)]


def made_of(crawl: Path, **options: Any) -> PreparationSettings:
    return PreparationSettings(
        sources=(str(crawl),), heldout_fraction=0.2, shard_tokens=7000, unit_bytes=60_000, **options
    )


@pytest.mark.parametrize("dedup", [False, True])
def test_workers_and_tasks_change_nothing(crawl: Path, tokenizer: Tokenizer, tmp_path: Path, dedup: bool) -> None:
    settings = made_of(crawl, dedup=dedup)
    for workers in (1, 3):
        prepare(settings, tokenizer, tmp_path / f"w{workers}", workers=workers)
    for first in (2, 0, 1):
        assert prepare(settings, tokenizer, tmp_path / "tasks", workers=2, task=(first, 3)) is None
    merge(tmp_path / "tasks")
    whole = content(tmp_path / "w1")
    assert len([name for name in whole if name.endswith(".bin")]) > 5
    assert content(tmp_path / "w3") == content(tmp_path / "tasks") == whole
    identities = {read_manifest(tmp_path / name).content_sha256 for name in ("w1", "w3", "tasks")}
    assert len(identities) == 1
    assert not (tmp_path / "tasks" / "units").exists()
    list(verify(tmp_path / "tasks"))


@pytest.mark.parametrize("hashes_at_once", [4_000_000, 7])
def test_the_first_of_equal_documents_is_kept(
    crawl: Path,
    speeches: list[str],
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hashes_at_once: int,
) -> None:
    monkeypatch.setattr("tostlm.data.preparation.dedup.HASHES_AT_ONCE", hashes_at_once)
    prepare(made_of(crawl), tokenizer, tmp_path / "all", workers=1)
    manifest = prepare(made_of(crawl, dedup=True), tokenizer, tmp_path / "once", workers=1)
    before = all_texts(tmp_path / "all")
    after = all_texts(tmp_path / "once")
    assert after == list(dict.fromkeys(before))
    assert sorted(after) == sorted(speeches)
    assert manifest is not None
    assert manifest.dropped == {"duplicate": 21}
    text_bytes = sum(split.text_bytes for split in manifest.splits.values())
    assert text_bytes == sum(len(text.encode()) for text in speeches)
    list(verify(tmp_path / "once"))


def test_documents_of_an_earlier_run_are_left_out(
    crawl: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "old.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches[:40]))
    prepare(PreparationSettings(sources=(str(tmp_path / "old.jsonl"),)), tokenizer, tmp_path / "old")
    for dedup, expected in ((False, sorted([*speeches[40:], *speeches[42::3]])), (True, sorted(speeches[40:]))):
        settings = made_of(crawl, dedup=dedup, dedup_against=(tmp_path / "old",))
        out = tmp_path / f"new-{dedup}"
        prepare(settings, tokenizer, out, workers=1)
        assert sorted(all_texts(out)) == expected


def test_a_killed_preparation_redoes_its_unfinished_unit_alone(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    command = ["prepare", "--source", str(crawl), "--tokenizer", str(tmp_path / "t.model"), "--unit-bytes", "60000"]
    command += ["--shard-tokens", "7000", "--heldout-fraction", "0.2", "--workers", "1"]
    succeed(tostlm(*command, "--out", str(tmp_path / "whole")))
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "tostlm", *command, "--out", str(out)])
    deadline = time.monotonic() + 60
    while not unit_folder(out, 1).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in (out / "units").glob(f"0*/{RESULT}")}
    assert len(finished) > 1
    assert not (out / "manifest.json").exists()
    fail(tostlm("prepare", "--merge", "--out", str(out)), "are not finished", "run `tostlm prepare` again")
    plan = json.loads((out / "plan.json").read_text())
    assert len(finished) < len(plan["units"])
    shutil.rmtree(unit_folder(out, 0))  # as if it had been lost; the others' files stay as they are
    kept = {path: mtime for path, mtime in finished.items() if path.exists()}
    prepare(
        made_of(crawl), tokenizer, out, workers=1, task=(0, 1)
    )  # every work unit, without the merge that would clear them
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    merge(out)
    assert content(out) == content(tmp_path / "whole")


def test_an_interrupted_merge_is_done_again(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = made_of(crawl, dedup=True)
    prepare(settings, tokenizer, tmp_path / "whole", workers=1)
    prepare(settings, tokenizer, tmp_path / "out", workers=1, task=(0, 1))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tostlm.data.preparation.merge"], "write_manifest", full)
        with pytest.raises(OSError, match="No space left"):
            merge(tmp_path / "out")
    merge(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_merge_killed_among_its_hashes_is_done_again(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup_module, "HASHES_AT_ONCE", 7)
    settings = made_of(crawl, dedup=True)
    prepare(settings, tokenizer, tmp_path / "whole", workers=1)
    prepare(settings, tokenizer, tmp_path / "out", workers=1, task=(0, 1))
    for step, count in (("_divide", 5), ("_duplicates_of_part", 3)):
        calls, call = itertools.count(1), getattr(dedup_module, step)

        def killed(*args: Any, calls: Any = calls, call: Any = call, count: int = count) -> Any:
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        with monkeypatch.context() as patch:
            patch.setattr(dedup_module, step, killed)
            process = multiprocessing.get_context("fork").Process(target=merge, args=(tmp_path / "out",))
            process.start()
            process.join()
        assert process.exitcode == -signal.SIGKILL
        assert list((tmp_path / "out" / ".dedup").iterdir())
    merge(tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert not (tmp_path / "out" / ".dedup").exists()


@pytest.mark.parametrize("dedup", [False, True])
def test_damage_of_a_finished_unit_is_not_merged(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, dedup: bool
) -> None:
    settings, out = made_of(crawl, dedup=dedup), tmp_path / "out"
    prepare(settings, tokenizer, tmp_path / "whole", workers=1)
    prepare(settings, tokenizer, out, workers=1, task=(0, 1))
    last = sorted((out / "units").iterdir())[-1]
    kept = shutil.copytree(out, tmp_path / "kept")
    for path in sorted(last.glob("train-00000.*")):
        flipped = bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]
        for content_, words in (
            (None, "has 0 bytes, not "),
            (path.read_bytes()[1:], "bytes, not "),
            (flipped, "is damaged"),
        ):
            path.unlink()
            if content_ is not None:
                path.write_bytes(content_)
            if words == "is damaged" and not dedup:  # its checksum goes into the manifest
                merge(out)
                if path.suffix != ".lengths":
                    with pytest.raises(UserError, match="is damaged: its SHA-256 is not the manifest's"):
                        list(verify(out))
            else:
                with pytest.raises(UserError, match=f"{path}.*{words}.*remove {last} and"):
                    merge(out)
                shutil.rmtree(last)
                prepare(settings, tokenizer, out, workers=1)
                assert content(out) == content(tmp_path / "whole")
            shutil.rmtree(out)
            shutil.copytree(kept, out)


def test_what_is_finished_stays_when_a_record_is_bad(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, speeches: list[str]
) -> None:
    with (crawl / "3.jsonl").open("ab") as file:
        file.write(b'{"text": "\xff"}\n' + json.dumps({"text": "after"}).encode() + b"\n")
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"3\.jsonl after byte \d+, record \d+: is no UTF-8.*--on-error skip"):
            prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=workers)
    assert unit_folder(tmp_path / "out", 0).exists()
    manifest = prepare(made_of(crawl, on_error="skip"), tokenizer, tmp_path / "out", workers=2)
    assert manifest is not None
    assert manifest.dropped == {"invalid UTF-8": 1}
    report = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [(line["reason"], "3.jsonl" in line["document"]) for line in report] == [("invalid UTF-8", True)]
    assert "after" in all_texts(tmp_path / "out")


def replace(path: Path) -> None:
    """Other content of the same size."""
    content = path.read_bytes()
    path.write_bytes(content[:-9] + b"x" * 5 + content[-4:])


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "replaced": (replace, "0.jsonl changed since work unit 0"),
    "emptied": (lambda path: path.write_bytes(b""), "0.jsonl is gone or empty since"),
    "grown": (lambda path: path.write_bytes(path.read_bytes() * 2), "0.jsonl"),
    "deleted": (lambda path: path.unlink(), "0.jsonl is gone or empty since"),
    "added": (lambda path: path.with_name("4.jsonl").write_bytes(path.read_bytes()), "4.jsonl is new since"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_between_two_runs_is_refused(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, change: str
) -> None:
    (crawl / "3.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(UserError, match="is no JSON"):
        prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)
    assert unit_folder(tmp_path / "out", 0).exists()
    harm, words = CHANGES[change]
    harm(crawl / "0.jsonl")
    with pytest.raises(UserError, match=words):
        prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)


def test_a_file_that_is_not_finished_may_be_corrected(crawl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (crawl / "3.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(UserError, match="is no JSON"):
        prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)
    (crawl / "3.jsonl").write_bytes(b'{"text": "corrected"}\n')
    assert prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)
    assert "corrected" in all_texts(tmp_path / "out")


def test_a_source_that_changes_while_it_is_read_is_refused(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = type(tokenizer).encode_batch

    def encode_and_touch(self: Tokenizer, texts: Sequence[str], threads: int) -> list[list[int]]:
        os.utime(crawl / "0.jsonl")
        return encode(self, texts, threads)

    monkeypatch.setattr(type(tokenizer), "encode_batch", encode_and_touch)
    with pytest.raises(UserError, match=r"0\.jsonl changed while it was read; run the same command again"):
        prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)
    monkeypatch.undo()
    assert prepare(made_of(crawl), tokenizer, tmp_path / "out", workers=1)


def test_a_killed_worker(crawl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """The parent says so, ends the others, and the next call continues."""
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    command = ["prepare", "--source", str(crawl), "--tokenizer", str(tmp_path / "t.model"), "--unit-bytes", "9000"]
    command += ["--workers", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "tostlm", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 60
    while not unit_folder(tmp_path / "out", 0).exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    worker = next(
        pid for pid in children.read_text().split() if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a worker ended with code -9" in errors
    assert len(errors.strip().splitlines()) == 1
    succeed(tostlm(*command))
    list(verify(tmp_path / "out"))


def test_another_tokenizer_or_setting_is_refused(
    crawl: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prepare(made_of(crawl), tokenizer, out, workers=1, task=(0, 2))
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    with pytest.raises(UserError, match="was started with another tokenizer"):
        prepare(made_of(crawl), other, out)
    with pytest.raises(UserError, match="was started with min_characters=1, not 5"):
        prepare(made_of(crawl, min_characters=5), tokenizer, out)
    prepare(made_of(crawl), tokenizer, out, workers=1, task=(1, 2))
    path = unit_folder(out, 1) / RESULT
    path.write_text(path.read_text().replace(tokenizer.sha256, other.sha256))
    with pytest.raises(UserError, match=r"work unit 1 of \S+ was made with another tokenizer"):
        merge(out)


def test_prepared_data_is_not_overwritten(data: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    before = content(copy)
    for settings, difference in (
        (PreparationSettings(sources=(str(corpus),)), "heldout_fraction=0.2, not 0.01"),
        (PreparationSettings(sources=("other",), heldout_fraction=0.2), "sources=.*, not "),
        (PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, dedup=True), "dedup=False, not True"),
    ):
        with pytest.raises(UserError, match=f"is prepared already, with {difference}"):
            prepare(settings, tokenizer, copy)
    assert content(copy) == before
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="exists and is no prepared data"):
        prepare(PreparationSettings(sources=(str(corpus),)), tokenizer, copy)


def test_a_finished_preparation_is_finished(
    crawl: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the manifest and the end leaves things that the same command, or --merge, clears."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["tostlm.data.preparation.merge"], "_clear", lambda _: None)
        prepare(made_of(crawl), tokenizer, out, workers=1)
    (out / ".manifest.json.partial-0").touch()
    left = {path.name for path in out.iterdir()}
    assert {"plan.json", "units", ".plan.lock", ".merge.lock"} < left
    copy = Path(shutil.copytree(out, tmp_path / "copy"))
    assert prepare(made_of(crawl, on_error="skip"), tokenizer, out, task=(0, 2)) is None
    merge(copy)
    for folder in (out, copy):
        cleared = left - {path.name for path in folder.iterdir()}
        assert cleared == {name for name in left if name[0] == "."} | {"plan.json", "units"}
        assert prepare(made_of(crawl), tokenizer, folder) == read_manifest(folder) == merge(folder)
    with pytest.raises(UserError, match="is prepared already, with another tokenizer"):
        prepare(made_of(crawl), train_tokenizer(speeches, 400, tmp_path / "other.model"), out)
    (out / "train-00000.bin").unlink()
    with pytest.raises(UserError, match=r"train-00000.bin has 0 bytes, .*; prepare the data again"):
        prepare(made_of(crawl), tokenizer, out)


def test_a_folder_within_its_source_is_refused(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(crawl)
    for source, out in ((crawl, crawl / "out"), (tmp_path / "link", crawl / "deep" / "out"), (crawl, crawl)):
        with pytest.raises(UserError, match=f"--out {out} lies in the source {source}"):
            prepare(made_of(source), tokenizer, out)
        assert len(list(crawl.iterdir())) == 5
    settings = PreparationSettings(sources=(f"{crawl}/**/*.json*",), unit_bytes=60_000)
    prepare(settings, tokenizer, crawl / "out", workers=1, task=(0, 2))
    with pytest.raises(UserError, match=r"out/plan.json is of the preparation itself.*choose an --out"):
        prepare(settings, tokenizer, crawl / "out", workers=1)


def test_a_name_that_is_no_utf8_is_refused(crawl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(crawl) + b"/\xff.jsonl")).write_text("{}")
    with pytest.raises(UserError, match=r"crawl/\\udcff.jsonl has a name that is no UTF-8.*; rename it"):
        prepare(made_of(crawl), tokenizer, tmp_path / "out")


def test_what_is_left_out_may_have_any_name(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(
        b'[{"id": "\xff", "text": 1}, {"id": "\\ud800", "text": 2}, {"id": 3, "text": "three"}]'
    )
    settings = PreparationSettings(sources=(str(tmp_path / "a.json"),), id_column="id", on_error="skip")
    prepare(settings, tokenizer, tmp_path / "out")
    assert read_manifest(tmp_path / "out").dropped == {"no text": 2}
    named = [json.loads(line)["document"] for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert named == [f"{tmp_path}/a.json, record 0 (\\udcff)", f"{tmp_path}/a.json, record 1 (\\ud800)"]


def test_a_plan_without_a_finished_document_is_given_up(
    crawl: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    other = train_tokenizer(speeches, 400, tmp_path / "other.model")
    with pytest.raises(UserError, match="has no column 'content'"):
        prepare(made_of(crawl, text_column="content"), other, out, workers=1)
    with pytest.raises(UserError, match=r"no document of \S+ is left; dropped: 81 not language=en"):
        prepare(made_of(crawl, keep=("language=en",)), tokenizer, out, workers=1)
    with (
        locked(out / "units" / ".00000.lock"),
        pytest.raises(UserError, match=r"another tostlm prepare works in \S+, with keep=\['language=en'\], not \[\]"),
    ):
        prepare(made_of(crawl), tokenizer, out, workers=1)
    prepare(made_of(crawl), tokenizer, out, workers=1)
    prepare(made_of(crawl), tokenizer, tmp_path / "whole", workers=1)
    assert content(out) == content(tmp_path / "whole")


def test_a_plan_that_is_made_again_while_a_unit_is_done_ends_it(
    crawl: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    encode = type(tokenizer).encode_batch

    def encode_and_plan(self: Tokenizer, texts: Sequence[str], threads: int) -> list[list[int]]:
        path = out / "plan.json"
        if path.exists():  # the plan is made
            path.write_text(path.read_text().replace('"min_characters": 1,', '"min_characters": 5,'))
        return encode(self, texts, threads)

    monkeypatch.setattr(type(tokenizer), "encode_batch", encode_and_plan)
    with pytest.raises(UserError, match=r"another tostlm prepare began \S+ again, with other settings"):
        prepare(made_of(crawl), tokenizer, out, workers=1)
    assert not list((out / "units").glob("0*"))


def test_tasks_that_start_together_agree_on_one_plan(crawl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One of other settings too, as the plan there has no finished unit."""
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    command = ["prepare", "--source", str(crawl), "--tokenizer", str(tmp_path / "t.model"), "--unit-bytes", "60000"]
    command += ["--shard-tokens", "7000", "--heldout-fraction", "0.2", "--workers", "1", "--out", str(tmp_path / "out")]
    fail(tostlm(*command, "--text-column", "content"), "has no column 'content'")
    tasks = [Program(*command, "--task", f"{index}/3") for index in range(3)]
    for task in tasks:
        succeed(task.end())
    succeed(tostlm("prepare", "--merge", "--out", str(tmp_path / "out")))
    assert "is finished" in succeed(tostlm(*command))
    prepare(made_of(crawl), tokenizer, tmp_path / "whole", workers=1)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_document_is_held_out_by_its_text_alone(
    data: Path, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "again.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in speeches[::-1]))
    settings = PreparationSettings(sources=(str(tmp_path / "again.jsonl"),), heldout_fraction=0.2)
    prepare(settings, tokenizer, tmp_path / "again")
    assert set(texts_of(tmp_path / "again", VALIDATION)) == set(texts_of(data, VALIDATION))


def test_nothing_is_left(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' * 10)
    with pytest.raises(UserError, match=r"no document of \S+ is left; dropped: 10 below 5 characters"):
        prepare(
            PreparationSettings(sources=(str(tmp_path / "a.jsonl"),), min_characters=5),
            tokenizer,
            tmp_path / "out",
        )
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no text"):
        prepare(PreparationSettings(sources=(str(tmp_path / "a.jsonl"),)), tokenizer, tmp_path / "other")


def test_the_command_line(crawl: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    begin = [
        "prepare",
        "--source",
        str(crawl),
        "--tokenizer",
        str(tmp_path / "t.model"),
        "--out",
        str(tmp_path / "out"),
    ]
    fail(tostlm(*begin[:3], "--out", "x"), "prepare needs --source and --tokenizer")
    fail(tostlm(*begin, "--on-error", "ignore"), "--on-error 'ignore'", "'fail' or 'skip'")
    fail(tostlm(*begin, "--heldout-fraction", "1"), "--heldout-fraction 1.0", "less than 1")
    fail(tostlm(*begin, "--keep", "n"), "condition 'n' is not COLUMN RELATION VALUE")
    fail(tostlm(*begin, "--dedup-against", "nowhere"), "nowhere holds no prepared data")
    fail(tostlm(*begin, "--task", "3/3"), "--task 3/3 must be INDEX/COUNT")
    fail(tostlm(*begin, "--id-column", "url"), "has no column 'url', only text, n")
    shutil.rmtree(tmp_path / "out")
    (crawl / "last.txt").unlink()
    printed = succeed(tostlm(*begin, "--keep", "n<10", "--id-column", "n", "--dedup", "--heldout-fraction", "0"))
    assert "of 10 documents" in printed
    assert "dropped 70 not n<10" in printed
    manifest = read_manifest(tmp_path / "out")
    assert manifest.command.startswith("tostlm prepare --source")
    assert manifest.model_dump()["settings"]["keep"] == ["n<10"]
    assert "(12)" in (tmp_path / "out" / "dropped.jsonl").read_text()
    assert load_tokenizer(tmp_path / "out").sha256 == tokenizer.sha256
    begin[-1] += "2"
    result = tostlm(*begin, "--heldout-fraction", "1e-9")
    succeed(result)
    assert "nothing in" in result.stderr
    assert "--heldout-fraction 1e-09 takes none of its 80 documents" in result.stderr


def test_the_defaults_of_the_command_are_those_of_the_settings() -> None:
    options = inspect.signature(prepare_command).parameters
    fields = PreparationSettings.model_fields
    defaults = {name: options[name].default for name in fields if name in options}
    assert {"unit_bytes", "max_document_bytes", "shard_tokens", "heldout_fraction"} <= defaults.keys()
    assert all(default in (None, fields[name].default) for name, default in defaults.items())


def test_tasks() -> None:
    assert parse_task("2/8") == (2, 8)
    for text in ("", "1", "8/8", "-1/3", "a/b", "²/3", "٢/8", "1/3/5", " 1/3"):
        with pytest.raises(UserError, match="must be INDEX/COUNT"):
            parse_task(text)
