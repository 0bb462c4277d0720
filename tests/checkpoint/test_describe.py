"""What people see of checkpoints: lists, descriptions, differences; and what of a run is deleted or merged."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import checkpoints, load_checkpoint
from tostlm.files import locked


@pytest.fixture(scope="module")
def trained_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with checkpoints of steps 2, 4 and 6."""
    run = Run(tmp_path_factory.mktemp("described"), data)
    succeed(run.train("train.save_every_steps=2", "train.eval_every_steps=2"))
    return run


@pytest.fixture
def run_dir(trained_run: Run, tmp_path: Path) -> Path:
    """A copy to change."""
    copy = tmp_path / "run"
    shutil.copytree(trained_run.dir, copy)
    return copy


def test_the_list_has_what_lies_there(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-00000003.damaged")
    shutil.copytree(folder / "step-00000002", folder / "step-00000001.passed-over")
    shutil.copytree(folder / "step-00000004", folder / ".saving-step-00000008")
    (folder / ".saving-step-00000008" / "COMPLETE").unlink()
    rows = [json.loads(line) for line in succeed(tostlm("checkpoint", "list", str(run_dir), "--json")).splitlines()]
    losses = {row["name"]: row["validation_loss"] for row in rows if row["name"].startswith("step")}
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 6, 8]
    notes = {row["step"]: row["notes"] for row in rows}
    best = min((2, 4, 6), key=lambda step: losses[f"step-0000000{step}"])
    assert (notes[1], notes[3], notes[8]) == (["passed over in a rollback"], ["quarantined"], ["unfinished"])
    assert [step for step in (2, 4, 6) if "best" in notes[step]] == [best]
    assert [step for step in (2, 4, 6) if "latest" in notes[step]] == [6]
    tokens = load_checkpoint(run_dir).config.tokens_after(4)
    assert rows[3]["tokens"] == tokens
    assert rows[3]["bytes"] == sum(f.stat().st_size for f in (folder / "step-00000004").rglob("*") if f.is_file())
    text = succeed(tostlm("checkpoint", "list", str(run_dir)))
    assert f"{tokens:,}" in text and "latest" in text and "quarantined" in text
    fail(tostlm("checkpoint", "list", str(run_dir / "checkpoints")), "is not the folder of a run that saved")


def test_a_checkpoint_is_described(trained: dict[str, Run], tmp_path: Path) -> None:
    text = succeed(tostlm("checkpoint", "show", str(trained["tssa"].dir)))
    checkpoint = load_checkpoint(trained["tssa"].dir)
    for expected in ("heads: tssa", f"sha256 {checkpoint.tokenizer.sha256[:16]}", "step 6 of 6", "COMPLETE", "adamw"):
        assert expected in text
    succeed(tostlm("convert", str(trained["softmax"].dir), "--to", "release", str(tmp_path / "out")))
    text = succeed(tostlm("checkpoint", "show", str(tmp_path / "out" / "ckpt.pt")))
    assert "heads: softmax" in text and f"imported from {tmp_path / 'out' / 'ckpt.pt'}" in text


def test_damage_is_found(run_dir: Path) -> None:
    assert succeed(tostlm("checkpoint", "verify", str(run_dir))).count(": whole\n") == 3
    file = run_dir / "checkpoints" / "step-00000004" / "state" / "00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    answer = tostlm("checkpoint", "verify", str(run_dir))
    fail(answer, "1 of 3 checkpoints are damaged")
    assert f"{file.parent.parent}: 00000.safetensors has another checksum\n" in answer.stdout
    succeed(tostlm("checkpoint", "verify", str(run_dir / "checkpoints" / "step-00000002")))


def test_differences_are_named(run_dir: Path, trained: dict[str, Run], tmp_path: Path) -> None:
    first, _, last = checkpoints(run_dir)
    shutil.copytree(first, tmp_path / "copy")
    assert succeed(tostlm("checkpoint", "diff", str(first), str(tmp_path / "copy"))) == "nothing differs\n"
    lines = succeed(tostlm("checkpoint", "diff", str(first), str(last), "--lines", "99")).splitlines()
    assert "progress: step is 2 and 6" in lines
    ours, theirs = (dict(load_checkpoint(path).lm.named_parameters()) for path in (first, last))
    name, change = lines[-1].removeprefix("weights: ").split(" differs by ")
    expected = (ours[name] - theirs[name]).norm() / ours[name].norm()
    assert float(change.split()[0]) == pytest.approx(float(expected), rel=0.05)
    assert len([line for line in lines if line.startswith("weights: ")]) == len(ours)
    said = succeed(tostlm("checkpoint", "diff", str(first), str(last), "--lines", "1"))
    assert said.endswith(f"and {len(lines) - 1} more; --lines {len(lines)} prints all\n")
    said = succeed(tostlm("checkpoint", "diff", str(first), str(trained["softmax"].dir), "--lines", "99"))
    assert "weights: blocks.0.mixer.temp is (2,) and none\n" in said
    assert 'config: model.layers is [{"mixer": "tssa"' in said


def test_old_checkpoints_are_deleted(run_dir: Path) -> None:
    first, middle, last = checkpoints(run_dir)
    prune = ("checkpoint", "prune", str(run_dir), "--keep-last", "1")
    assert succeed(tostlm(*prune, "--dry-run")) == f"{first}: would be deleted\n{middle}: would be deleted\n"
    assert checkpoints(run_dir) == [first, middle, last]
    with locked(run_dir / ".lock"):
        fail(tostlm(*prune), "is in use by a tostlm train")
    assert succeed(tostlm(*prune, "--keep-every", "4")) == f"{first}: deleted\n"
    assert checkpoints(run_dir) == [middle, last]
    losses = {path: load_checkpoint(path).train_state.validation_loss or 0.0 for path in (middle, last)}
    best = min(losses, key=losses.__getitem__)
    succeed(tostlm(*prune, "--keep-best"))
    assert set(checkpoints(run_dir)) == {best, last}
    fail(tostlm("checkpoint", "prune", str(run_dir.parent), "--keep-last", "1"), "is not the folder of a run")


def test_what_is_kept_is_whole(run_dir: Path) -> None:
    first, middle, last = checkpoints(run_dir)
    for path, loss in ((first, math.nan), (middle, 1.0), (last, 2.0)):
        state = path / "train_state.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"validation_loss": loss}))
    answer = tostlm("checkpoint", "prune", str(run_dir), "--keep-last", "1")
    fail(answer, f"{last}, which would be kept, is damaged: train_state.json has")
    assert checkpoints(run_dir) == [first, middle, last]
    for path in (first, middle, last):  # as if they had been saved so
        checksums = json.loads((path / "COMPLETE").read_text())
        content = (path / "train_state.json").read_bytes()
        checksums["train_state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        (path / "COMPLETE").write_text(json.dumps(checksums))
    rows = [json.loads(line) for line in succeed(tostlm("checkpoint", "list", str(run_dir), "--json")).splitlines()]
    assert [row["validation_loss"] for row in rows] == [None, 1.0, 2.0]
    assert (
        succeed(tostlm("checkpoint", "prune", str(run_dir), "--keep-last", "1", "--keep-best")) == f"{first}: deleted\n"
    )


def test_other_names_are_passed_by(run_dir: Path) -> None:
    folder = run_dir / "checkpoints"
    for name in ("step-abc.damaged", ".saving-step-xyz", "step-1.damaged", "notes"):
        (folder / name).mkdir()
    (folder / "latest").write_bytes(b"\xff\n")
    rows = [json.loads(line) for line in succeed(tostlm("checkpoint", "list", str(run_dir), "--json")).splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]


def test_checkpoints_are_merged_by_shares(run_dir: Path, tmp_path: Path) -> None:
    first, middle, last = checkpoints(run_dir)
    merge = ("checkpoint", "merge", str(first), str(middle), str(last), "--out", str(tmp_path / "merged"))
    fail(tostlm(*merge, "--shares", "0.5,0.5"), "--shares 0.5,0.5 must be a number for each of 3 checkpoints")
    fail(tostlm(*merge, "--shares", "0.5,0.5,0.5"), "that add up to 1")
    fail(tostlm(*merge, "--shares", "a,b,c"), "must be numbers with commas between")
    fail(tostlm(*merge, "--shares", "1e300,-1e300,1"), "is not finite; leave out what has diverged")
    succeed(tostlm(*merge, "--shares", "0.5,-0.25,0.75"))
    weights = [load_checkpoint(path).lm.embed.weight.double() for path in (first, middle, last)]
    expected = 0.5 * weights[0] - 0.25 * weights[1] + 0.75 * weights[2]
    torch.testing.assert_close(
        load_checkpoint(tmp_path / "merged").lm.embed.weight.double(), expected, rtol=1e-6, atol=1e-7
    )
