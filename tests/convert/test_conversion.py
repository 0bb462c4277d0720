"""Whatever the format: a folder appears whole or not at all, and replaces only what a conversion has written."""

import json
import os
import signal
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tests.model.common import SOFTMAX, TSSA
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import FORMATS, convert
from tostlm.convert.shards import write_shards
from tostlm.errors import UserError
from tostlm.files import atomic_folder
from tostlm.model import create_lm

formats = pytest.mark.parametrize("to", ["hf", "release", "tostlm"])


@formats
def test_a_folder_is_replaced_if_that_is_asked(trained: dict[str, Run], tmp_path: Path, to: str) -> None:
    source, out = load_checkpoint(trained["softmax"].dir), tmp_path / "out"
    convert(source, out, FORMATS[to].write)
    record = out / "conversion.json"
    listed = json.loads(record.read_text())["files"]
    assert sorted(listed) == sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    record.write_text(record.read_text() + " ")
    command = ("convert", str(trained["softmax"].dir), "--to", to, str(out))
    fail(tostlm(*command), "exists; remove it or choose another")
    (out / "precious").touch()
    fail(tostlm(*command, "--overwrite"), "out has what no conversion has written: precious; move that elsewhere first")
    (out / "precious").unlink()
    for inside in (path for path in out.iterdir() if path.is_dir()):
        (inside / "precious").touch()
        fail(tostlm(*command, "--overwrite"), f"out has what no conversion has written: {inside.name}/precious")
        (inside / "precious").unlink()
    assert record.read_text().endswith(" ")
    succeed(tostlm(*command, "--overwrite"))
    assert not record.read_text().endswith(" ")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_checkpoint(out)
    assert all(file.stat().st_mode & stat.S_IROTH for file in out.rglob("*"))


def test_other_things_are_not_replaced(trained: dict[str, Run], run: Run, tmp_path: Path) -> None:
    source = trained["tssa"].dir
    convert(load_checkpoint(source), tmp_path / "hf", FORMATS["hf"].write)
    (tmp_path / "link").symlink_to(tmp_path / "hf")
    (tmp_path / "file").touch()
    for out in (source, tmp_path / "link", tmp_path / "file", tmp_path):
        answer = tostlm("convert", str(source), "--to", "hf", str(out), "--overwrite")
        fail(answer, f"{out} is no folder that a conversion has written, and is not replaced; choose another")
    newest = load_checkpoint(source).path
    (tmp_path / "checkpoints").symlink_to(newest.parent)
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "config.json").write_text("{}")  # which others write too
    for out in (newest, tmp_path / "named"):
        answer = tostlm("convert", str(source), "--to", "hf", str(out), "--overwrite")
        fail(answer, f"{out} is no folder that a conversion has written")
    for out in (tmp_path / "checkpoints" / "step-00000009", newest / ".." / "step-00000009"):
        answer = tostlm("convert", str(tmp_path / "hf"), "--to", "tostlm", str(out))
        fail(answer, "is among the checkpoints of a run")
    answer = tostlm("convert", str(newest), "--to", "tostlm", str(newest / "inside"))
    fail(answer, f"is in {newest}, which is converted")
    answer = tostlm("convert", str(tmp_path / "hf"), "--to", "tostlm", str(tmp_path / "hf"), "--overwrite")
    fail(answer, "holds the model that is converted")
    succeed(tostlm("convert", str(source), "--to", "hf", str(tmp_path / "new"), "--overwrite"))


def test_a_failure_leaves_what_was_there(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = load_checkpoint(trained["tssa"].dir), tmp_path / "out"
    convert(source, out, FORMATS["hf"].write)
    before = {file: file.read_bytes() for file in out.rglob("*.*")}

    def fail_late(*_: object) -> list[object]:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="out cannot be written: No space left on device; nothing was published"):
        convert(source, out, fail_late, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*.*")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("to", "room"), [("hf", 50_000), ("release", 50_000), ("deepspeed", 600_000), ("torch-export", 500)]
)
def test_a_full_disk(trained: dict[str, Run], small_disk: Path, to: str, room: int) -> None:
    disk = os.statvfs(small_disk)
    (small_disk / "fill").write_bytes(b"x" * (disk.f_bavail * disk.f_frsize - room))
    with pytest.raises(UserError, match="out cannot be written: No space left on device; nothing was published"):
        convert(load_checkpoint(trained["softmax"].dir), small_disk / "out", FORMATS[to].write)
    assert [path.name for path in small_disk.iterdir()] == ["fill"]


def test_the_next_conversion_removes_what_a_killed_one_left(trained: dict[str, Run], tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = f"""
import time
from pathlib import Path
from tostlm.files import atomic_folder
from tostlm.model import create_lm
with atomic_folder(Path({str(out)!r})) as folder:
    (folder / "half").touch()
    print("written", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written\n"
    source = load_checkpoint(trained["tssa"].dir)
    with pytest.raises(UserError, match=r"another process is writing .*out; wait for it, or choose another folder"):
        convert(source, out, FORMATS["hf"].write)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not out.exists()
    convert(source, out, FORMATS["hf"].write)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "half").exists()


def test_what_a_link_leads_to_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    (tmp_path / ".out.partial").symlink_to("mine")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "link").symlink_to(tmp_path / "mine")
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "mine" / "file").exists()
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "link").symlink_to(tmp_path / "mine")
    with atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "mine" / "file").exists()


def test_folders_are_exchanged_where_the_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tostlm.files.ctypes.CDLL", lambda _: object())
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "out") as folder:
            (folder / content).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_options_go_with_their_format(trained: dict[str, Run], tmp_path: Path) -> None:
    run, out = str(trained["softmax"].dir), str(tmp_path / "out")
    fail(tostlm("convert", run, "--to", "release", out, "--own-class"), "--own-class goes with --to hf")
    fail(tostlm("convert", run, "--to", "tostlm", out, "--shard-size", "1MB"), "--shard-size goes with --to hf")
    fail(
        tostlm("convert", run, "--to", "hf", out, "--shard-size", "many"), "--shard-size 'many' must be a whole number"
    )
    fail(tostlm("convert", run, "--to", "hf", out, "--tokenizer", "x"), "has a tokenizer of its own; leave --tokenizer")


def test_the_release_holds_only_what_it_computes(data: Path, tmp_path: Path, trained: dict[str, Run]) -> None:
    source = load_checkpoint(trained["tssa"].dir)
    for switches in ({"layers": TSSA + SOFTMAX}, {"positions": None}, {"mlp": "relu2"}, {"mlp_width": 50}):
        lm = create_lm(replace(source.config.model, **switches), 0)
        with pytest.raises(UserError, match="is no model of the ToST release"):
            convert(source._replace(lm=lm), tmp_path / "out", FORMATS["release"].write)
    assert not list(tmp_path.iterdir())


def test_shards_are_of_limited_size(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.full((n + 1, 100), float(n)) for n in range(6)}  # 400 bytes to 2,400
    write_shards(tmp_path, tensors.items(), 1500)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-0000{n}-of-00005.safetensors" for n in range(1, 6)]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # which transformers asks for
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
