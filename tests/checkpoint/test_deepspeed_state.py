"""Elastic checkpoints: state of real engines written at one ZeRO stage and number of ranks, read at another."""

import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from torch import Tensor

from tests.conftest import Run
from tests.processes import on_ranks
from tests.train.engines import KEPT_STEP, LAST_STEP, Job, run_jobs
from tests.train.run_helpers import VARIANTS
from tostlm.checkpoint import layout
from tostlm.checkpoint.deepspeed_state import ADAM_KINDS, MUON_KINDS
from tostlm.checkpoint.layout import checkpoint_folder, load_checkpoint, read_recurrent_state, read_train_state
from tostlm.checkpoint.load import resume
from tostlm.config import batch_plan, load_config
from tostlm.launch import RankInfo
from tostlm.optim import EMA, ROW_SQUARES
from tostlm.plan import checkpoint_bytes
from tostlm.train.engine import start_engine

TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # of a loss
OTHERS = VARIANTS.keys() - {"bf16"}
ENGINES = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
ENGINES += [(1, "bf16 with fp32 gradients"), *((stage, "fp16") for stage in (1, 2, 3))]
ENGINES += [(stage, "fp32, muon and ema") for stage in (0, 1, 2, 3)]
MATRICES = "_proj.weight"  # how the names end that Muon updates


FOUR = pytest.param(4, 2, marks=pytest.mark.slow)  # ranks, and how far the stages are shifted


def options(stage: int, precision: str) -> list[str]:
    keys = {
        "fp32": [],
        "bf16": ["bf16.enabled=true"],
        "bf16 with fp32 gradients": ["bf16.enabled=true", "data_types.grad_accum_dtype=fp32"],
        "fp32, muon and ema": [],
        "fp16": ["fp16.enabled=true", "fp16.initial_scale_power=20"],  # overflows once before KEPT_STEP
    }[precision]
    # Some of a model's parameters then stay whole, and some do not.
    threshold = ["zero_optimization.stage3_param_persistence_threshold=100"] if stage == 3 else []
    muon = ("name=muon", "muon.newton_schulz_dtype=fp32", "muon.normuon_beta2=0.9", "muon.split_heads=true")
    others = [*(f"optimizer.{key}" for key in muon), "train.ema_decay=0.5"]
    return [
        *(others if "muon" in precision else ()),
        *(f"deepspeed.{key}" for key in [f"zero_optimization.stage={stage}", *keys, *threshold]),
    ]


def kinds(precision: str, name: str) -> tuple[str, ...]:
    own = (*MUON_KINDS, ROW_SQUARES) if "muon" in precision and name.endswith(MATRICES) else ADAM_KINDS
    return (*own, EMA) if "ema" in precision else own


def other(stage: int, precision: str, shift: int) -> tuple[int, str]:
    """Another stage that DeepSpeed has for a precision; its fp16 at stage 0 clips in its own way."""
    if precision == "fp16":
        return (stage - 1 + shift) % 3 + 1, precision
    return (stage + shift) % 4, precision if "muon" in precision else precision.partition(" ")[0]


def tensors_of(run_dir: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted((checkpoint_folder(run_dir, KEPT_STEP) / "state").iterdir()):
        with safetensors.safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def bits(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {key: tensor.numpy().tobytes() for key, tensor in tensors.items()}


class Matrix:
    """Every engine of ENGINES trained on two ranks, then resumed by others from what it saved."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run, self.folder = run, folder
        self.trained = self.do(2, 0, lambda name: None)

    @cache  # noqa: B019
    def results(self, world_size: int, shift: int) -> list[dict[str, Any]]:
        return self.do(world_size, shift, lambda name: str(self.folder / name))

    def do(self, world_size: int, shift: int, origin: Callable[[str], str | None]) -> list[dict[str, Any]]:
        jobs = []
        for stage, precision in ENGINES:
            name = f"{stage} {precision}"
            engine = other(stage, precision, shift) if shift else (stage, precision)
            run_dir = self.resumed(name, world_size, shift) if origin(name) else self.folder / name
            jobs.append(Job(str(self.run.file), [*options(*engine), f"run_dir={run_dir}"], origin(name)))
        return run_jobs(world_size, jobs, self.folder / f"jobs-{world_size}-{shift}")

    def resumed(self, name: str, world_size: int, shift: int) -> Path:
        return self.folder / f"{name} on {world_size} shifted {shift}"


@pytest.fixture(scope="module")
def matrix(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    folder = tmp_path_factory.mktemp("matrix")
    return Matrix(Run(folder, data), folder)


@pytest.mark.parametrize("number", range(len(ENGINES)), ids=[f"{precision} {stage}" for stage, precision in ENGINES])
class TestEveryEngine:
    def test_resumes_exactly_where_nothing_changes(self, matrix: Matrix, number: int) -> None:
        expected = matrix.trained[number]["losses"]
        assert list(expected) == list(range(1, LAST_STEP + 1))
        resumed = matrix.results(2, 0)[number]["losses"]
        assert resumed == {step: expected[step] for step in resumed}
        assert len(resumed) == LAST_STEP - KEPT_STEP

    @pytest.mark.parametrize(("world_size", "shift"), [(1, 1), FOUR])
    def test_resumes_at_other_ranks_and_another_stage(
        self, matrix: Matrix, number: int, world_size: int, shift: int
    ) -> None:
        expected, resumed = matrix.trained[number]["losses"], matrix.results(world_size, shift)[number]["losses"]
        precision = ENGINES[number][1].split()[0].strip(",")
        if precision == "fp16":  # whether a later gradient overflows hangs on how the ranks add up
            resumed = {KEPT_STEP + 1: resumed[KEPT_STEP + 1]}
        tolerance = TOLERANCE[precision]
        assert resumed == pytest.approx({step: expected[step] for step in resumed}, abs=tolerance)

    @pytest.mark.parametrize(("world_size", "shift"), [(2, 0), (1, 1), FOUR])
    def test_holds_what_was_written(self, matrix: Matrix, number: int, world_size: int, shift: int) -> None:
        stage, precision = ENGINES[number]
        name = f"{stage} {precision}"
        facts = matrix.results(world_size, shift)[number]
        written = tensors_of(matrix.folder / name)
        assert bits(tensors_of(matrix.resumed(name, world_size, shift))) == bits(written)
        state = read_train_state(checkpoint_folder(matrix.folder / name, KEPT_STEP))
        assert (state.step, state.world_size, state.zero_stage) == (KEPT_STEP, 2, stage)
        assert facts["weights_unlike_masters"] == []
        assert facts["adam_steps"] == [state.optimizer_steps]
        assert facts["shared_counts"] == 0
        assert facts["weight_decays"] == [0.1, 0.0, *([0.1] if "muon" in precision else [])]
        assert facts["loss_scale"] == state.loss_scale

    def test_is_saved_in_full_and_in_fp32(self, matrix: Matrix, number: int) -> None:
        stage, precision = ENGINES[number]
        folder = checkpoint_folder(matrix.folder / f"{stage} {precision}", KEPT_STEP)
        found, lm = tensors_of(matrix.folder / f"{stage} {precision}"), load_checkpoint(folder).lm
        shapes = {
            f"{name}/{kind}": p.shape[:1] if kind == ROW_SQUARES else p.shape
            for name, p in lm.named_parameters()
            for kind in kinds(precision, name)
        }
        assert {key: tensor.shape for key, tensor in found.items()} == shapes
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
        taken = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        assert 1 <= taken / checkpoint_bytes(load_config(folder / "config.yaml")) < 1.1  # their headers
        dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(precision.split()[0].strip(","), torch.bfloat16)
        for name, parameter in lm.named_parameters():
            assert parameter.dtype == dtype
            assert parameter.equal(found[f"{name}/weight"].to(dtype))
        if dtype != torch.float32:
            assert not found["embed.weight/weight"].equal(lm.embed.weight.float())
        assert found["embed.weight/exp_avg_sq"].count_nonzero() > 0


class CountingSlice:
    """A tensor in a file of safetensors that counts the bytes that are read of it."""

    total = 0

    def __init__(self, stored: Any) -> None:
        self.get_shape, self._stored = stored.get_shape, stored

    def __getitem__(self, index: object) -> Tensor:
        part: Tensor = self._stored[index]
        CountingSlice.total += part.nbytes
        return part


def resume_counting_bytes(file: str, checkpoint: Path, rank: int, world_size: int) -> list[int]:
    """Return the bytes that this rank reads to resume at each ZeRO stage."""
    read_elements = layout._read_elements
    layout._read_elements = lambda stored, wanted: read_elements(CountingSlice(stored), wanted)
    found = []
    for stage in range(4):
        config, CountingSlice.total = load_config(Path(file), options(stage, "fp32")), 0
        engine = start_engine(config, batch_plan(config, world_size), RankInfo(rank, rank, world_size))
        resume(engine, config, checkpoint)
        found.append(CountingSlice.total)
        engine.destroy()
    return found


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_rank_reads_its_own_part_of_a_checkpoint(matrix: Matrix, world_size: int, tmp_path: Path) -> None:
    """Beside it at most a row at each end of each tensor, which it shares with another rank."""
    folder = checkpoint_folder(matrix.folder / "0 fp32", KEPT_STEP)
    tensors = tensors_of(matrix.folder / "0 fp32").values()
    total, rows = sum(x.nbytes for x in tensors), sum(2 * x[0].nbytes for x in tensors)
    read = on_ranks(world_size, partial(resume_counting_bytes, str(matrix.run.file), folder), tmp_path / "ranks")
    for rank in read:
        assert rank[0] == total  # without ZeRO
        assert all(of_stage <= total / world_size + rows for of_stage in rank[1:])
    for stage in (1, 2, 3):
        assert total <= sum(rank[stage] for rank in read) <= total + world_size * rows


def test_an_overflow_is_remembered_and_is_no_update(matrix: Matrix) -> None:
    for stage in (1, 2, 3):
        state = read_train_state(checkpoint_folder(matrix.folder / f"{stage} fp16", KEPT_STEP))
        assert state.optimizer_steps == KEPT_STEP - 1
        assert state.loss_scale is not None
        assert state.loss_scale["cur_iter"] == KEPT_STEP
        assert state.loss_scale["last_overflow_iter"] in (1, 2)
        assert state.loss_scale["cur_hysteresis"] == 1  # of 2: the next overflow halves the scale


def test_without_its_file_of_weights_a_model_is_its_masters(matrix: Matrix) -> None:
    folder = checkpoint_folder(matrix.folder / "2 bf16", KEPT_STEP)
    before = load_checkpoint(folder).lm.state_dict()
    (folder / "weights.safetensors").rename(folder / "elsewhere")
    after = load_checkpoint(folder).lm.state_dict()
    (folder / "elsewhere").rename(folder / "weights.safetensors")
    assert after.keys() == before.keys()
    assert all(after[name].dtype == torch.bfloat16 and after[name].equal(before[name]) for name in before)


def test_the_recurrent_state_is_saved(run: Run, tmp_path: Path) -> None:
    overrides = [
        *options(1, "fp32"),
        "data.stateful=true",
        "data.reset_at_documents=true",
        "train.save_weights=false",
    ]
    run_jobs(1, [Job(str(run.file), overrides)], tmp_path / "jobs")
    folder = checkpoint_folder(run.dir, KEPT_STEP)
    assert {len(tensor) for tensor in read_recurrent_state(folder).values()} == {8}  # sequences of a step
    assert not (folder / "weights.safetensors").exists()
    assert "recurrent_state.safetensors" in json.loads((folder / "COMPLETE").read_text())


@pytest.mark.slow
def test_optimizer_and_parameters_offloaded(run: Run, tmp_path: Path) -> None:
    """Slow where DeepSpeed has to compile its Adam."""
    cpu = "deepspeed.zero_optimization.offload_{}.device=cpu"
    engines = {
        "0": options(0, "fp32"),
        **{f"{stage} optimizer": [*options(stage, "fp32"), cpu.format("optimizer")] for stage in (1, 2, 3)},
        "3 both": [*options(3, "fp32"), cpu.format("optimizer"), cpu.format("param")],
        "3 bf16": [*options(3, "bf16"), cpu.format("optimizer"), cpu.format("param")],
    }

    def job(name: str, run_dir: str, origin: str | None = None) -> Job:
        return Job(str(run.file), [*engines[name], f"run_dir={tmp_path}/{run_dir}"], origin and f"{tmp_path}/{origin}")

    trained = run_jobs(2, [job(name, name) for name in engines], tmp_path / "jobs")
    names = [name for name in engines if name != "0"]
    same = run_jobs(2, [job(name, f"{name} again", name) for name in names], tmp_path / "jobs")
    onward = run_jobs(2, [job(name, f"{name} after 0", "0") for name in names if "bf16" not in name], tmp_path / "jobs")
    back = run_jobs(1, [job("0", f"0 after {name}", name) for name in names if "bf16" not in name], tmp_path / "jobs")
    plain = trained[0]["losses"]
    for name, before, after in zip(names, trained[1:], same, strict=True):
        assert before["losses"] == pytest.approx(plain, abs=TOLERANCE["bf16" if "bf16" in name else "fp32"]), name
        assert after["losses"] == {step: before["losses"][step] for step in after["losses"]}, name
        assert bits(tensors_of(tmp_path / f"{name} again")) == bits(tensors_of(tmp_path / name)), name
    for result in [*same, *onward, *back]:
        assert (result["weights_unlike_masters"], result["adam_steps"]) == ([], [KEPT_STEP])
    for result in [*onward, *back]:
        assert result["losses"] == pytest.approx({step: plain[step] for step in result["losses"]}, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "sizes"), [("fp32", (1, 2, 4)), ("bf16", (1, 2, 4)), *((name, (1, 2)) for name in sorted(OTHERS))]
)
def test_every_stage_from_every_stage(data: Path, tmp_path: Path, variant: str, sizes: tuple[int, ...]) -> None:
    file = Run(tmp_path, data).file

    def job(stage: int, run_dir: str, origin: str | None = None) -> Job:
        return Job(
            str(file),
            [*options(stage, "fp32"), *VARIANTS.get(variant, []), f"run_dir={tmp_path}/{run_dir}"],
            origin and f"{tmp_path}/{origin}",
        )

    expected = {}
    for world_size in sizes:
        jobs = [job(stage, f"{stage}-{world_size}") for stage in range(4)]
        for stage, result in enumerate(run_jobs(world_size, jobs, tmp_path / "jobs")):
            expected[stage, world_size] = result["losses"]
    for world_size in sizes:
        pairs = [(origin, stage) for origin in expected for stage in range(4)]
        jobs = [job(stage, "last", f"{origin[0]}-{origin[1]}") for origin, stage in pairs]
        for (origin, stage), result in zip(pairs, run_jobs(world_size, jobs, tmp_path / "jobs"), strict=True):
            losses = {step: expected[origin][step] for step in result["losses"]}
            same = origin == (stage, world_size)
            close = pytest.approx(losses, abs=TOLERANCE["bf16" if variant in ("bf16", "autocast") else "fp32"])
            assert result["losses"] == (losses if same else close), (origin, stage, world_size)
