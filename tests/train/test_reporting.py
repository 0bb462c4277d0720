"""All that a run reports, in one run: two ranks at ZeRO stage 3, killed on the way and started again."""

import gzip
import json
import math
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from tests.conftest import Run, succeed
from tests.train.run_helpers import wait_for_a_checkpoint
from tostlm.checkpoint import checkpoints, load_checkpoint, read_train_state
from tostlm.train.batches import Batch, open_data
from tostlm.tssa import Inputs, tssa_statistics

EVERYTHING = [
    "deepspeed.zero_optimization.stage=3",
    "deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
    "model.depth=3",
    "model.layers=[{mixer: tssa, forgetting: ladder, halflife_tokens: [4, 64]}, {mixer: softmax}]",
    "train.save_every_steps=5",
    "train.eval_every_steps=5",
    "train.statistics_every_steps=5",
    "train.profile_steps=[1,2]",
    "train.wandb_project=tost",
]


OF_LAYERS = ("activation_rms", "gradient_norm", "update_ratio", "weight_rms")


def lines(run: Run, kind: str) -> list[dict[str, Any]]:
    content = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, content) if line["kind"] == kind]


class Reported:
    """The run, the lines it had written when it was killed, and the step it went on from."""

    def __init__(self, run: Run) -> None:
        self.run = run
        program = run.start(*EVERYTHING, "train.steps=100000", nproc=2, WANDB_MODE="offline")
        wait_for_a_checkpoint(run)
        os.kill(program.children()[0], signal.SIGKILL)
        program.end(60)
        self.before = lines(run, "train")
        self.resumed_from = read_train_state(checkpoints(run.dir)[-1]).step
        self.steps = self.resumed_from + 2
        with (run.dir / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "train", "st')  # torn, as a machine that loses power leaves it
        result = run.train(*EVERYTHING, f"train.steps={self.steps}", nproc=2, WANDB_MODE="offline")
        succeed(result)
        self.stderr = result.stderr


@pytest.fixture(scope="module")
def reported(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    return Reported(Run(tmp_path_factory.mktemp("reported"), data))


def test_no_step_is_missing_or_twice(reported: Reported) -> None:
    steps = [line["step"] for line in lines(reported.run, "train")]
    assert steps == list(range(1, reported.steps + 1))
    events = EventAccumulator(str(reported.run.dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == steps
    evaluated = [*range(5, reported.steps, 5), reported.steps]
    assert [event.step for event in events.Scalars("validation/perplexity")] == evaluated
    assert [event.step for event in events.Scalars("statistics/entropy/0")] == evaluated


def test_none_of_its_libraries_says_anything(reported: Reported) -> None:
    assert reported.stderr == ""


def test_the_split_is_the_time_between_reports(reported: Reported) -> None:
    """Of steps 3 to 5, after the trace."""
    first, *rest = reported.before[1:5]
    split = [{key: value for key, value in line.items() if key.startswith("seconds/")} for line in rest]
    assert all(each.keys() >= {f"seconds/{name}" for name in ("data", "forward", "backward", "step")} for each in split)
    wall = rest[-1]["time"] - first["time"]
    assert sum(sum(each.values()) for each in split) == pytest.approx(wall, rel=0.1)
    assert sum(each["seconds/other"] for each in split) < 0.25 * wall


def test_saves_and_evaluations_have_their_time(reported: Reported) -> None:
    line = next(line for line in lines(reported.run, "train") if line["step"] == reported.resumed_from + 1)
    assert "save_seconds" not in line  # of this process
    for line in reported.before[5:6]:
        assert line["save_seconds"] == line["seconds/save"] > 0
        assert min(line["seconds/eval"], line["seconds/statistics"]) > 0


def test_the_trace_is_of_the_steps_asked_for(reported: Reported) -> None:
    (path,) = (reported.run.dir / "trace").iterdir()
    names = {event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
    assert {name for name in names if str(name).startswith("ProfilerStep#")} == {"ProfilerStep#1", "ProfilerStep#2"}
    assert {"forward", "backward", "step", "tostlm_tssa_operator::forward"} <= names


@torch.no_grad()
def test_the_statistics_are_the_operators(reported: Reported) -> None:
    """Of the last step's first rows, with the weights after it, in one process."""
    lm, config = load_checkpoint(reported.run.dir).lm, load_checkpoint(reported.run.dir).config
    rows = Batch.from_numpy(open_data(config, 1).training.batch(reported.steps - 1, 0, 1)).split(4)[0]
    projected = {}
    for layer in (0, 2):
        lm.blocks[layer].mixer.in_proj.register_forward_hook(
            lambda module, inputs, w, layer=layer: projected.update({layer: w})
        )
    lm(rows.inputs)
    halflives = torch.tensor([4.0, 64.0])
    line = lines(reported.run, "statistics")[-1]
    of_tssa = ("entropy", "gate", "shortest_horizon", "longest_horizon")
    of_mixers = {f"{name}/{layer}" for name in of_tssa for layer in (0, 2)}
    of_all = {f"{name}/{layer}" for name in OF_LAYERS for layer in range(3)}
    beside = {f"{name}/{part}" for name in OF_LAYERS[1:] for part in ("embed", "norm")}
    assert line.keys() == {"kind", "step", "tokens", "time", *of_mixers, *of_all, *beside}
    for layer, w in projected.items():
        stats = tssa_statistics(Inputs(w, lm.blocks[layer].mixer.temp, None, 2 ** (-1 / halflives)))
        assert line[f"entropy/{layer}"] == pytest.approx(float(stats.entropy), abs=1e-5)
        assert line[f"gate/{layer}"] == pytest.approx(float(stats.gate.mean()), abs=1e-5)
        horizons = [line[f"{name}/{layer}"] for name in ("shortest_horizon", "longest_horizon")]
        assert horizons == pytest.approx((halflives / math.log(2)).tolist())


def records(path: Path) -> Iterator[wandb_internal_pb2.Record]:
    """What W&B wrote offline: protocol buffers in blocks of LevelDB's log format, after a header of 7 bytes."""
    content, place, message = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        _, length, part = struct.unpack_from("<IHB", content, place)
        message += content[place + 7 : place + 7 + length]
        place += 7 + length
        if part in (1, 4):  # whole, or the last of several
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def test_both_processes_are_one_run_of_wandb(reported: Reported) -> None:
    first, second = sorted((reported.run.dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert first.name == second.name == f"run-{(reported.run.dir / 'wandb' / 'id').read_text()}.wandb"
    (started,) = (record.run for record in records(second) if record.HasField("run"))
    assert (started.project, started.display_name) == ("tost", "run")
    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(second)
        if record.HasField("history")
    ]
    written = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    losses = reported.run.metrics("train")
    assert written == {step: losses[step] for step in (reported.steps - 1, reported.steps)}
    assert {"validation/loss", "statistics/gate/2", "train/mfu", "train/lr/decay"} - {k for r in rows for k in r} == {
        "train/mfu"  # where the peak is known
    }
