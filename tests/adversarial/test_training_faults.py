"""Runs that are struck by faults and started again: what they end with is what an undisturbed run ends with.

A case is a ZeRO stage, a number of ranks, trouble with the numbers, and one or two starts that are struck, perhaps on
other ranks, each with a fault or two at some moments and perhaps with files damaged afterwards. All is drawn from the
case's number and the seed.
"""

import json
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch

from tests.adversarial.injection import FAULTS, TROUBLES, Fault, Harm, Moment
from tests.conftest import Run
from tests.train.run_helpers import REPORTED, zero_options
from tests.train.test_metrics import on_board
from tests.warm import Program
from tostlm.checkpoint import checkpoint_folder, checkpoints, step_of
from tostlm.checkpoint.integrity import find_damage
from tostlm.checkpoint.load import DAMAGED
from tostlm.checkpoint.rollback import PASSED_OVER, RECORD
from tostlm.errors import EXIT_LOST_RANK, EXIT_REQUEUE, EXIT_USER_ERROR
from tostlm.files import read_json_lines

pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]  # every start has a limit of its own

CASES = 20
STEPS, SAVE_EVERY, EVAL_EVERY = 12, 3, 4
LIMIT_SECONDS, HANG_SECONDS = 180, 6
TOLERANCE = 1e-4  # of a loss, after a resume on other ranks or at another stage
NORM_TOLERANCE = 1e-2  # of a gradient norm: those of undisturbed runs on other ranks differ by 4e-3 after a rollback
TORCH_LOG = re.compile(r"\[rank\d+\]:\[W|Exception raised from |frame #\d+: |<omitting python frames>")
OPTIONS = [
    f"train.steps={STEPS}",
    f"train.save_every_steps={SAVE_EVERY}",
    f"train.eval_every_steps={EVAL_EVERY}",
    "train.batch_tokens=768",
    "train.bad_steps_before_rollback=2",
    "train.spike_zscore=6",
    "train.spike_window_steps=5",
]

LOST, DISK = {EXIT_LOST_RANK}, {EXIT_USER_ERROR}
STOPPED = {EXIT_REQUEUE, 0}  # 0 in the last step
ENDS: dict[str, set[int]] = {  # the exit codes that each fault may lead to
    "SIGKILL of a rank": LOST,
    "SIGKILL of all ranks": LOST,
    "SIGKILL of the launcher": {-9},
    "SIGTERM": STOPPED,
    "SIGUSR1 to all ranks": STOPPED | LOST,  # lost before training handles it
    "SIGTERM to a rank": STOPPED | LOST,
    "SIGTERM twice": {128 + 15, *STOPPED},
    "SIGHUP": {128 + 1},
    "Ctrl-C": {128 + 2},
    "SIGSTOP of a rank": LOST,
    "a rank stuck": LOST,
    "full disk": {EXIT_USER_ERROR, 0},
    "limit of file sizes": {EXIT_USER_ERROR, 0},
    "data removed": {EXIT_USER_ERROR, 0},
    "data replaced": {EXIT_USER_ERROR, 0, *LOST},  # lost by a signal, where the file that is mapped is truncated
}
DAMAGES = ["a bit of the newest checkpoint", "its end", "a file of it", "lines of metrics.jsonl", "leftovers", "data"]


class Start(NamedTuple):
    stage: int
    ranks: int
    faults: list[Fault]
    damage: str | None
    clock_seconds: float


class Case(NamedTuple):
    stage: int
    ranks: int
    trouble: str
    starts: list[Start]


def draw_case(rng: random.Random, whats: list[str]) -> Case:
    stage, ranks = rng.randrange(4), rng.choices([1, 2, 3], [2, 3, 1])[0]
    trouble = rng.choices(list(TROUBLES), [5, 1, 1, 2])[0]
    starts = []
    for _ in range(rng.choice([1, 1, 2])):
        moved = rng.random() < 0.15
        place = (rng.randrange(4), rng.choice([1, 2, 3])) if moved else (stage, ranks)
        faults = [draw_fault(rng, place[1], trouble, whats) for _ in range(rng.choice([1, 1, 1, 2]))]
        damage = rng.choice(DAMAGES) if rng.random() < 0.5 else None
        starts.append(Start(*place, faults, damage, rng.choice([0, 0, 0, -86_400, 86_400])))
    place = (rng.randrange(4), rng.choice([1, 2, 3])) if rng.random() < 0.15 else (stage, ranks)
    return Case(stage, ranks, trouble, [*starts, Start(*place, [], None, 0)])


def draw_fault(rng: random.Random, ranks: int, trouble: str, whats: list[str]) -> Fault:
    what, rank = rng.choice(whats), rng.randrange(ranks)
    if what == "SIGSTOP of a rank" and ranks == 1:
        what = "a rank stuck"  # nobody sees that a lone rank is stopped
    kinds = ["call", "phase", "phase", "save", "save", "saved", *["rolled back"] * 3 * (trouble == "a rollback")]
    kind = rng.choice(kinds)
    saved = rng.randrange(SAVE_EVERY, STEPS, SAVE_EVERY)
    if kind == "call":
        names = ["start_engine", "context_parallel_group"]
        if what not in ("SIGSTOP of a rank", "a rank stuck"):  # the watchdog comes after these
            names += ["init_distributed", "open_data"]
        moment = Moment(rng.choice(["before", "after"]), rng.choice(names))
    elif kind == "phase":
        name = rng.choice(["data", "forward", "backward", "step", "eval", "save"])
        every = {"eval": EVAL_EVERY, "save": SAVE_EVERY}.get(name)
        step = rng.randrange(every, STEPS, every) if every else rng.randrange(STEPS)
        moment = Moment("phase", name, step)
    elif kind == "save":
        each = 3 if rank else 14  # operations of a save
        moment = Moment("save", number=rng.randrange(each * (STEPS // SAVE_EVERY)))
    else:
        moment = Moment(kind, number=saved)
    return Fault(what, moment, rank, rng.choice([2_000, 20_000, 200_000, 500_000]))


class World:
    """What all cases share: prepared data, a disk that can be filled, and the undisturbed runs that were needed."""

    def __init__(self, folder: Path, data: Path, other_data: Path, disk: Path | None) -> None:
        self.folder, self.data, self.other_data, self.disk = folder, data, other_data, disk
        self.calm: dict[tuple[int, int, str], Run] = {}

    def reference(self, case: Case) -> Run:
        key = case.stage, case.ranks, case.trouble
        if key not in self.calm:
            folder = self.folder / "-".join(map(str, key)).replace(" ", "-")
            folder.mkdir()
            self.calm[key] = run = Run(folder, self.data)
            harm = Harm([], case.trouble, run.dir, self.data, self.other_data, folder, 0)
            ended = start(run, harm, case.stage, case.ranks)
            assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
        return self.calm[key]


def start(run: Run, harm: Harm, stage: int, ranks: int) -> "subprocess.CompletedProcess[str]":
    hang = HANG_SECONDS if any(fault.what in ("SIGSTOP of a rank", "a rank stuck") for fault in harm.faults) else 600
    options = [*OPTIONS, *zero_options(stage), f"train.hang_timeout_seconds={hang}"]
    options += [f"run_dir={run.dir}", f"data.path={harm.data}", "--nproc", str(ranks)]
    return Program("train", str(run.file), *options, before=harm.inflict).end(LIMIT_SECONDS)


def wait_for(processes: list[int]) -> None:
    """Wait until processes are gone: those of a killed launcher save first."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "a rank stayed behind"
        time.sleep(0.05)


class Struck:
    """A case under way: its run, and what has struck it so far."""

    def __init__(self, world: World, case: Case, folder: Path, rng: random.Random) -> None:
        self.world, self.case, self.rng = world, case, rng
        self.run = Run(folder, world.data)
        self.folder, self.data = folder, world.data
        whats = {fault.what for each in case.starts for fault in each.faults}
        if "full disk" in whats and world.disk is not None:
            self.run.dir = world.disk / "run"
        if any(what.startswith("data") for what in whats) or any(each.damage == "data" for each in case.starts):
            self.data = Path(shutil.copytree(world.data, folder / "data"))
        self.struck: set[str] = set()
        self.damaged: set[int] = set()  # steps of the checkpoints that were damaged on purpose

    def play(self) -> None:
        for number, each in enumerate(self.case.starts):
            self.play_start(each, self.folder / f"start-{number}")
            if each.damage is not None:
                self.damage(each.damage)
        self.check_end()

    def play_start(self, each: Start, marks: Path) -> None:
        marks.mkdir()
        intact, before = self.intact(), losses(self.run)
        harm = Harm(
            each.faults, self.case.trouble, self.run.dir, self.data, self.world.other_data, marks, each.clock_seconds
        )
        ended = start(self.run, harm, each.stage, each.ranks)
        said = f"{each}\nexit code {ended.returncode}\n{ended.stdout[-500:]}\n{ended.stderr[-3000:]}"
        struck = [fault.what for number, fault in enumerate(each.faults) if (marks / str(number)).exists()]
        for mark in marks.iterdir():
            wait_for([int(process) for process in mark.read_text().split()])
        assert ended.returncode in set().union(*(ENDS[what] for what in struck)) if struck else {0}, said
        assert "Traceback" not in ended.stderr, said
        lines = [line for line in ended.stderr.splitlines() if not is_notice(line) and not TORCH_LOG.match(line)]
        if ended.returncode in (EXIT_USER_ERROR, EXIT_LOST_RANK):
            names = [line.partition(": ")[2].partition(": ")[0] for line in lines if line]  # error on rank N
            assert names and len(set(names)) == len(names), said
        elif ended.returncode in (EXIT_REQUEUE, 0):
            assert not lines, said
        assert all(line.startswith("tostlm: ") for line in lines if line), said
        self.check_intact(intact, said)
        if ended.returncode == EXIT_REQUEUE and losses(self.run) != before and not self.record().exists():
            steps = [step_of(path) for path in checkpoints(self.run.dir)] or [0]
            assert max(losses(self.run), default=0) <= steps[-1], said
        self.struck.update(struck)
        self.put_back()

    def put_back(self) -> None:
        if self.data != self.world.data:
            shutil.rmtree(self.data, ignore_errors=True)
            shutil.copytree(self.world.data, self.data)
        if self.world.disk is not None:
            (self.world.disk / "ballast").unlink(missing_ok=True)

    def record(self) -> Path:
        return self.run.dir / "checkpoints" / RECORD

    def intact(self) -> list[Path]:
        return [path for path in checkpoints(self.run.dir) if find_damage(path) is None]

    def check_intact(self, before: list[Path], said: str) -> None:
        """No checkpoint was lost, and none was marked as damaged that is not."""
        passed_over = [path.with_name(path.name + PASSED_OVER) for path in before]
        for path, renamed in zip(before, passed_over, strict=True):
            kept = path if path.exists() or self.case.trouble != "a rollback" else renamed
            assert kept.is_dir() and find_damage(kept) is None, f"{path} is lost\n{said}"
        named = (self.run.dir / "checkpoints").glob(f"*{DAMAGED}")
        assert {int(path.name.removeprefix("step-").removesuffix(DAMAGED)) for path in named} <= self.damaged, said

    def damage(self, what: str) -> None:
        intact = self.intact()
        if what == "data":
            shutil.rmtree(self.data / "train-00000.bin", ignore_errors=True)
            (self.data / "train-00000.bin").unlink()
            self.refuse("train-00000.bin")
        elif what == "lines of metrics.jsonl" and max(losses(self.run), default=STEPS) < STEPS:  # not of a finished run
            file = self.run.dir / "metrics.jsonl"
            lines = file.read_bytes().splitlines(keepends=True)
            lines.insert(self.rng.randrange(len(lines) + 1), self.rng.choice([b"\xff\x00garbage\n", b"[1]\n", b"\n"]))
            file.write_bytes(b"".join(lines) + self.rng.choice([b"", b'{"kind": "train", "st']))
        elif what == "leftovers" and intact:
            for name in (".saving-step-00000099/state", ".removing-step-00000001", "../heartbeats"):
                (self.run.dir / "checkpoints" / name).mkdir(parents=True, exist_ok=True)
            (self.run.dir / "heartbeats/rank-00000.json").write_text("{")
            (self.run.dir / "checkpoints/latest").write_text("nowhere")
        elif what in DAMAGES[:3] and intact and not self.record().exists():
            self.damage_checkpoint(intact[-1], what)
            if len(intact) == 1:
                self.refuse("damaged; bring a copy of one, or move them elsewhere to start anew")
                for path in (self.run.dir / "checkpoints").glob(f"*{DAMAGED}"):
                    shutil.rmtree(path)
        else:
            return
        self.struck.add(f"damaged: {what}")
        self.put_back()

    def damage_checkpoint(self, checkpoint: Path, what: str) -> None:
        self.damaged.add(step_of(checkpoint))
        file = self.rng.choice(sorted(path for path in checkpoint.rglob("*") if path.is_file()))
        if what == "a file of it":
            file.unlink()
        elif what == "its end":
            os.truncate(file, self.rng.randrange(file.stat().st_size))
        else:
            content = bytearray(file.read_bytes())
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)

    def refuse(self, words: str) -> None:
        """A start that needs the user first."""
        harm = Harm([], self.case.trouble, self.run.dir, self.data, self.world.other_data, self.folder, 0)
        ended = start(self.run, harm, self.case.stage, self.case.ranks)
        lines = [line for line in ended.stderr.splitlines() if not is_notice(line)]
        assert (ended.returncode, len(lines)) == (EXIT_USER_ERROR, 1) and words in lines[0], ended.stderr

    def check_end(self) -> None:
        calm = self.world.reference(self.case)
        moved = any((each.stage, each.ranks) != (self.case.stage, self.case.ranks) for each in self.case.starts)
        written = [json.loads(line) for line in (self.run.dir / "metrics.jsonl").read_text().splitlines()]
        times = Counter((line["kind"], line["step"]) for line in written if line["kind"] != "event")
        assert set(times.values()) == {1}, times
        for kind, key in REPORTED:
            found, expected = losses(self.run, kind, key), losses(calm, kind, key)
            tolerance = NORM_TOLERANCE if key == "grad_norm" else TOLERANCE
            assert found == (pytest.approx(expected, abs=tolerance, rel=tolerance) if moved else expected)
        board = on_board(self.run, "train/loss")
        assert [step for step, _ in board] == list(losses(self.run))
        assert dict(board) == pytest.approx(losses(self.run))
        ours, theirs = (tensors(checkpoint_folder(run.dir, STEPS)) for run in (self.run, calm))
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            difference = (tensor - theirs[name]).norm() / theirs[name].norm().clamp_min(1e-3)
            assert difference < 20 * TOLERANCE if moved and name.endswith("/weight") else moved or not difference, name


def losses(run: Run, kind: str = "train", key: str = "loss") -> dict[int, float]:
    """What a run has written so far, without numbers that are not finite and lines that were damaged."""
    written, _ = read_json_lines(run.dir / "metrics.jsonl")
    return {line["step"]: line[key] for line in written if line.get("kind") == kind and line[key] is not None}


def tensors(checkpoint: Path) -> dict[str, Any]:
    files = sorted((checkpoint / "state").iterdir())
    return {key: tensor for file in files for key, tensor in safetensors.torch.load_file(file).items()}


def is_notice(line: str) -> bool:
    """Whether a line on stderr says what became of a checkpoint."""
    return line.startswith("tostlm: ") and (" is quarantined as " in line or " is now " in line)


@pytest.fixture
def world(data: Path, digits: Path, tmp_path: Path, request: pytest.FixtureRequest) -> World:
    disk = request.getfixturevalue("small_disk") if os.geteuid() == 0 else None
    if disk is not None:
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
    return World(tmp_path, data, digits, disk)


def test_training_faults(
    world: World, seed: int, numbers: Callable[[int], range], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    struck: Counter[str] = Counter()
    held: Counter[str] = Counter()
    failures = []
    try:
        for number in numbers(CASES):
            rng = random.Random(f"{seed}/{number}")
            case = draw_case(rng, [what for what in FAULTS if what != "full disk" or world.disk])
            folder = tmp_path / f"case-{number}"
            folder.mkdir()
            under_way = Struck(world, case, folder, rng)
            try:
                under_way.play()
            except Exception as error:
                failures.append(number)
                with capsys.disabled():
                    print(
                        f"\ncase {number} of seed {seed} (--seed {seed} --case {number}): {case}\n{error}", flush=True
                    )
            else:
                held.update([*under_way.struck, "all cases"])
                shutil.rmtree(folder)
            struck.update([*under_way.struck, "all cases"])
            shutil.rmtree(under_way.run.dir, ignore_errors=True)
    finally:  # of an interrupted test too
        with capsys.disabled():
            for what in [*FAULTS, *(f"damaged: {what}" for what in DAMAGES), "all cases"]:
                print(f"{what:<45}{struck[what]:>5} cases, {held[what]:>5} held")
    assert not failures, f"run again with --seed {seed} and --case one of {failures}"
