"""`tostlm plan`: what does not fit is said before it is queued, with what would."""

import json
from pathlib import Path

import pytest

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.accelerators import ACCELERATORS, accelerator_of
from tostlm.config import RunConfig, load_config, shipped_configs
from tostlm.errors import UserError
from tostlm.plan import memory, plan_runs, require_fit
from tostlm.plan.fit import USABLE, advice, changed_config
from tostlm.plan.plan import plan_run
from tostlm.plan.timing import Rates

LARGE = ["model.width=512", "model.depth=4", "model.vocab_size=8192", "train.batch_tokens=4096"]
BY_HAND = Rates(products=1.0, memory=1.0, network=1.0)


def settings(line: str) -> dict[str, int]:
    return {key: int(value) for key, value in (word.split("=") for word in line.split() if "=" in word)}


def test_a_plan_as_a_table_and_as_json(run: Run) -> None:
    arguments = ["plan", str(run.file), "--nodes", "1,2", "--gpus-per-node", "2", "--device", "a100-80gb"]
    table = succeed(tostlm(*arguments, "--price", "2"))
    assert "1 x 2" in table and "2 x 2" in table and "on a100-80gb" in table
    assert all(row in table for row in ("memory of each", "activations", "step", "days", "GPU-hours", "price"))
    found = json.loads(succeed(tostlm(*arguments, "--json")))["plans"]
    assert [plan["gpus"] for plan in found] == [2, 4]
    for plan in found:
        assert plan["fits"] and plan["memory_total"] == sum(plan["memory"].values())
        hours = run.config().tokens / plan["tokens_per_second"] / 3600
        assert plan["gpu_hours"] == pytest.approx(hours * plan["gpus"])
        assert plan["kilowatt_hours"] == pytest.approx(plan["gpu_hours"] * 0.4)
        assert plan["tokens_per_second"] == pytest.approx(512 / sum(plan["step"].values()))


def test_a_run_that_does_not_fit_ends_with_2_and_what_would(run: Run) -> None:
    deep = [
        "model.depth=96",
        "model.width=8192",
        "model.heads=64",
        "train.batch_tokens=1024",
        "train.micro_batch_tokens=64",
    ]
    command = ["plan", str(run.file), *deep, "--nodes", "2"]
    refused = tostlm(*command)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    (said,) = [line for line in refused.stdout.splitlines() if "does not fit" in line]
    way = settings(said)
    assert way["deepspeed.zero_optimization.stage"] == 3
    succeed(tostlm(*command, *(f"{key}={value}" for key, value in way.items())))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "h100"], ["--device h100 is not known", "the nearest is h100-80gb", "mi300x-192gb, cpu"]),
        (["--nodes", "0"], ["--nodes '0' must be whole numbers above 0"]),
        (["--nodes", "3"], ["does not divide into 24 ranks"]),
        (["--bench", "no.json"], ["--bench no.json cannot be read: No such file"]),
    ],
)
def test_mistakes(run: Run, arguments: list[str], words: list[str]) -> None:
    fail(tostlm("plan", str(run.file), *arguments), *words)


def test_a_measured_rate_takes_the_rooflines_place(run: Run, tmp_path: Path) -> None:
    rates = [
        {"model": name, "context": n, "pass_tokens_per_second": n * 1000.0} for name in ("run", "b") for n in (32, 64)
    ]
    (tmp_path / "bench.json").write_text(json.dumps({"rates": rates}))
    (plan,) = plan_runs(run.file, [], [1], 2, "h100-80gb", tmp_path / "bench.json")
    assert plan.step.products == pytest.approx(256 / 64000) and plan.step.streaming == 0
    (tmp_path / "bench.json").write_text(json.dumps({"rates": rates[2:]}))
    with pytest.raises(UserError, match="has no rate of run; it has b"):
        plan_runs(run.file, [], [1], 2, "h100-80gb", tmp_path / "bench.json")
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(UserError, match="is no file of `tostlm bench train --out`"):
        plan_runs(run.file, [], [1], 2, "h100-80gb", tmp_path / "bench.json")


def test_a_step_by_hand(run: Run) -> None:
    """Two passes of a rank, gradients summed and weights gathered on one link, in the time of a data sheet's rates."""
    config, device = run.config(), ACCELERATORS["h100-80gb"]
    plan = plan_run(config, 1, 2, "h100-80gb", BY_HAND)
    P = plan.parameters
    assert plan.step.products == pytest.approx(256 * plan.flops_per_token / device.fp32_flops)
    assert plan.step.optimizer == pytest.approx(P / 2 * 32 / device.bytes_per_second)
    assert plan.sent_bytes == (2 * 4 * P + 4 * P) / 2
    assert plan.step.communication == pytest.approx(plan.sent_bytes / device.link + 2 * 20e-6)
    assert plan.utilization == pytest.approx(512 * plan.flops_per_token / plan.step.total / 2 / device.fp32_flops)


def test_communication_hides_behind_the_backward_pass_where_deepspeed_overlaps_it(run: Run) -> None:
    waits = {
        overlaps: plan_run(
            run.config(f"deepspeed.zero_optimization.overlap_comm={overlaps}"), 2, 1, "h100-80gb", BY_HAND
        ).step
        for overlaps in ("true", "false")
    }
    hidden = waits["false"].communication - waits["true"].communication
    assert hidden == pytest.approx(2 / 3 * (waits["true"].products + waits["true"].streaming))


def test_recomputation_takes_a_pass_forward_more(run: Run) -> None:
    every = [plan_run(run.config(*sets), 1, 1, "h100-80gb", BY_HAND).step.products for sets in ([], [CHECKPOINTED])]
    assert every[1] == pytest.approx(every[0] * 4 / 3)


CHECKPOINTED = "train.activation_checkpointing_every=1"


class TestAdvice:
    """Each is one that fits where it is followed."""

    def advice(self, config: RunConfig, ranks: int, room: float) -> list[str]:
        found = advice(config, ranks, room / USABLE, on_gpu=False)
        for line in found if settings(found[0]) else []:
            changed = changed_config(config, settings(line))
            assert memory(changed, ranks, on_gpu=False).total <= room, line
        return found

    def test_less_memory_by_a_stage_a_smaller_micro_batch_and_recomputation(self, run: Run) -> None:
        config = run.config(*LARGE, "train.micro_batch_tokens=1024", "deepspeed.zero_optimization.stage=0")
        needs = memory(config, 4, on_gpu=False).total
        found = [settings(self.advice(config, 4, needs * share)[0]) for share in (0.95, 0.65, 0.5)]
        assert found[0] == {"deepspeed.zero_optimization.stage": 1}
        assert found[1].keys() > found[0].keys() and len(found[2]) >= len(found[1])
        assert "no ZeRO stage" in self.advice(config, 4, needs / 100)[0]

    def test_a_micro_batch_alone_on_one_rank(self, run: Run) -> None:
        config = run.config(*LARGE, "train.micro_batch_tokens=4096")
        needs = memory(config, 1, on_gpu=False).total
        assert settings(self.advice(config, 1, needs - 1)[0]) == {"train.micro_batch_tokens": 2048}

    def test_a_context_that_is_too_long_for_one_is_split(self, run: Run) -> None:
        sets = [*LARGE, "data.context_tokens=4096", "train.micro_batch_tokens=4096", "train.batch_tokens=16384"]
        config = run.config(*sets, CHECKPOINTED)
        needs = memory(changed_config(config, {"deepspeed.zero_optimization.stage": 3}), 4, on_gpu=False).total
        assert settings(self.advice(config, 4, needs * 0.8)[0])["train.context_parallel_size"] == 2

    def test_more_than_is_needed(self, run: Run) -> None:
        config = run.config(*LARGE, "deepspeed.zero_optimization.stage=3", "train.micro_batch_tokens=64")
        found = self.advice(config, 4, 1e12)
        assert found[0] == "deepspeed.zero_optimization.stage=0 is enough"
        assert found[1] == "train.micro_batch_tokens=1024 fits too, in fewer passes"
        offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
        assert "stage" not in " ".join(self.advice(run.config(*LARGE, offload), 4, 1e12))
        split = run.config(*LARGE, "train.context_parallel_size=2", "train.micro_batch_tokens=32")
        assert "contexts need not be split" in self.advice(split, 4, 1e12)[-1]


def test_require_fit_names_what_is_missing(run: Run) -> None:
    config = run.config(*LARGE)
    require_fit(config, 2, 1e12, True, "80 GiB")
    with pytest.raises(UserError, match=r"takes .* GiB per rank on 2 ranks, above 1 GiB, of which 8% .*; set .*="):
        require_fit(config, 2, 1 << 30, True, "1 GiB")


def shipped(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=() if name == "tost-base" else pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", shipped([each.name for each in shipped_configs() if not each.name.startswith("quickstart")])
)
def test_shipped_configs_fit_eight_gpus_of_80_gb(name: str) -> None:
    config = load_config(Path(name))
    require_fit(config, 8, ACCELERATORS["a100-80gb"].memory_bytes or 0, True, "80 GB")


def test_accelerators_are_found_by_torchs_names() -> None:
    assert accelerator_of("NVIDIA H100 80GB HBM3") == ACCELERATORS["h100-80gb"]
    assert accelerator_of("AMD Instinct MI300X") == ACCELERATORS["mi300x-192gb"]
    assert accelerator_of("Tesla V100-SXM2-16GB") is None
