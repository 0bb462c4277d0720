"""Verdicts from numbers: who is slow, wrong, apart or ahead, and what is said of it."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tostlm.doctor import clocks, devices, disk, gemm, plan, traffic, versions
from tostlm.doctor.finding import FAIL, OK, WARN, Finding, amount, complaint, named, report

NODES = ["a", "a", "b", "b", "c", "c"]
CPU = devices.Device("cpu", "EPYC", 10**9, True, "", 0)


def gpu(number: int, name: str = "H100", suits: bool = True, visible: int = 2) -> devices.Device:
    return devices.Device("cuda", name, 80 * 10**9, suits, f"GPU-{number}", visible)


def gemms(*speeds: float) -> list[gemm.Gemm]:
    return [gemm.Gemm("float32", 0.1, True, speed) for speed in speeds]


def links(*rates: float) -> list[traffic.Link]:
    return [traffic.Link(True, rate) for rate in rates]


def test_versions() -> None:
    own = {"torch": "2.13.0", "tostlm": "0.1.0"}
    assert versions.judge([own] * 6, NODES).level == OK
    found = versions.judge([own, own, own, {**own, "torch": "2.12.0"}, own, own], NODES)
    assert (found.level, found.unfit) == (FAIL, (3,))
    assert found.measured == "rank 3 on b is unfit: torch is 2.12.0 on rank 3, elsewhere 2.13.0"
    assert found.way_out == "install the same there, or exclude b"


def test_of_two_opinions_rank_0_has_the_right_one() -> None:
    assert versions.judge([{"torch": "1"}, {"torch": "2"}], ["a", "b"]).unfit == (1,)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        ([CPU] * 4, OK, "4 x EPYC on a, b"),
        ([gpu(0), gpu(1), gpu(2), gpu(3)], OK, "4 x H100 on a, b"),
        ([gpu(0), gpu(1), gpu(2), CPU], FAIL, "rank 3 on b is unfit: on EPYC, the others on H100"),
        ([gpu(0), gpu(1), gpu(2), gpu(2)], FAIL, "ranks 2 on b, 3 on b share the GPU GPU-2"),
        ([gpu(0), gpu(1), gpu(2), gpu(3, name="A100")], WARN, "rank 3 on b: A100, elsewhere H100"),
        ([gpu(n, visible=8) for n in range(4)], WARN, "a has 8 GPUs and 2 ranks"),
    ],
)
def test_devices(found: list[devices.Device], level: str, words: str) -> None:
    verdict = devices.judge(found, NODES[:4])
    assert (verdict.level, verdict.measured) == (level, words)


@pytest.mark.parametrize(
    ("speeds", "slow"),
    [
        ([10, 10, 10, 10, 10, 10], ()),
        ([10, 11, 9, 10, 7.1, 10], ()),
        ([10, 11, 9, 10, 6.9, 10], (4,)),
        ([10, 10, 3, 2, 10, 10], (2, 3)),
    ],
)
def test_a_rank_is_slow_below_0_7_of_the_median(speeds: list[float], slow: tuple[int, ...]) -> None:
    (found,) = gemm.judge(gemms(*speeds), NODES)
    assert found.unfit == slow
    assert found.level == (FAIL if slow else OK)


def test_a_slow_rank_is_told_by_its_share() -> None:
    (found,) = gemm.judge(gemms(1e13, 1e13, 1e13, 3.1e12, 1e13, 1e13), NODES)
    assert found.measured == "rank 3 on b is unfit: 0.31 of the median 10 TFLOP/s float32"
    assert found.way_out == "exclude b"


@pytest.mark.parametrize(
    "ill", [gemm.Gemm("bfloat16", 1.5, True, 1.0), gemm.Gemm("bfloat16", float("nan"), True, 1.0)], ids=["off", "nan"]
)
def test_wrong_products(ill: gemm.Gemm) -> None:
    (found,) = gemm.judge([*gemms(1, 1, 1, 1, 1), ill], NODES)
    assert (found.level, found.unfit) == (FAIL, (5,))
    assert "off by" in found.measured


def test_products_that_change_from_time_to_time() -> None:
    unsteady = gemm.Gemm("float32", 0.1, False, 1.0)
    (found,) = gemm.judge([unsteady, *gemms(1, 1)], NODES)
    assert found.unfit == (0,)
    assert "other bits from time to time" in found.measured


def test_the_best_of_several_rounds_counts_and_an_error_of_any() -> None:
    assert gemm.best(gemms(1, 3, 2)).flops == 3
    assert not gemm.best([*gemms(1), gemm.Gemm("float32", 0.1, False, 1.0)]).steady
    assert traffic.best_link(links(1, 3, 2)) == traffic.Link(True, 3)
    assert not traffic.best_link([traffic.Link(False, 9), *links(1)]).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_here_are_within_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "WINDOW_SECONDS", 0.001)
    found = gemm.measure(dtype)
    assert 0.001 < found.worst_error < 1
    assert found.steady


def test_sums() -> None:
    right, wrong = (traffic.Sums(exact, ((1_000_000, 0.001),)) for exact in (True, False))
    assert "1 GB/s at 1 MB" in traffic.judge_sums([right, right], NODES).measured
    assert traffic.judge_sums([right, wrong, right], NODES).unfit == (1,)
    found = traffic.judge_sums([wrong, wrong], NODES)
    assert (found.level, found.unfit) == (FAIL, ())


@pytest.mark.parametrize(
    ("rates", "exclude"),
    [
        # of rank n, the link from rank n - 1: ranks 0, 2 and 4 receive from another host
        ([1, 9, 1, 9, 1, 9], set()),
        ([1, 9, 1, 9, 0.4, 9], {"b", "c"}),
        ([1, 9, 0.4, 9, 0.4, 9], {"b"}),
        ([1, 9, 1, 4, 1, 9], {"b"}),
    ],
    ids=["between hosts is slower", "one link", "both links of a host", "inside a host"],
)
def test_slow_links_are_those_below_half_of_their_like(rates: list[float], exclude: set[str]) -> None:
    (found,) = traffic.judge_links(links(*rates), NODES)
    assert {NODES[rank] for rank in found.unfit} == exclude
    assert found.level == (FAIL if exclude else OK)


def test_of_two_links_none_is_slow() -> None:
    assert traffic.judge_links(links(1, 100), ["a", "a"])[0].level == OK


def test_a_damaged_message_names_both_ends() -> None:
    found, *_ = traffic.judge_links([traffic.Link(True, 1), traffic.Link(True, 1), traffic.Link(False, 1)], NODES)
    assert found.measured == "ranks 1 on a, 2 on b are unfit: 1 on a -> 2 on b: messages arrive damaged"


@pytest.mark.parametrize(("ahead", "level"), [(0.9, OK), (1.1, WARN), (-2.0, WARN)])
def test_clocks(ahead: float, level: str) -> None:
    found = clocks.judge([(0.0, 0.0), (ahead, 0.001)], ["a", "b"])
    assert found.level == level
    assert level == OK or f"rank 1 on b: {ahead:+.1f} s" in found.measured


def test_a_slow_answer_is_no_skew() -> None:
    assert clocks.judge([(0.0, 0.0), (1.5, 2.0)], ["a", "b"]).level == OK


@pytest.mark.parametrize(
    ("overrides", "found", "level", "words"),
    [
        ([], [CPU] * 2, OK, "8 sequences a step, 2 passes of a rank; fp32, ZeRO stage 1"),
        ([], [CPU] * 3, FAIL, "does not divide into 3 ranks"),
        (
            ["train.context_parallel_size=4"],
            [CPU] * 2,
            FAIL,
            "2 ranks do not form whole groups of train.context_parallel_size 4",
        ),
        (["deepspeed.bf16.enabled=true"], [gpu(0), gpu(1, suits=False)], FAIL, "bf16, which rank 1 on a cannot"),
        (
            ["deepspeed.fp16.enabled=true"],
            [CPU._replace(suits=False)] * 2,
            FAIL,
            "fp16, which ranks 0 on a, 1 on a cannot",
        ),
        (["model.width=4096"], [CPU] * 2, WARN, "of 500 MB a rank"),
        (["model.width=4096"], [gpu(0), gpu(1)], OK, "of 80 GB a rank"),
    ],
)
def test_the_config(run: Run, overrides: list[str], found: list[devices.Device], level: str, words: str) -> None:
    verdict = plan.judge(run.config(*overrides), found, NODES[: len(found)])
    assert verdict.level == level
    assert words in verdict.measured


@pytest.mark.parametrize(
    ("overrides", "bytes_a_parameter"),
    [
        (["deepspeed.zero_optimization.stage=0"], 4 + 4 + 8),
        (["deepspeed.zero_optimization.stage=1"], 4 + 4 + 8 / 4),
        (["deepspeed.zero_optimization.stage=2"], 4 + (4 + 8) / 4),
        (["deepspeed.zero_optimization.stage=3"], (4 + 4 + 8) / 4),
        (["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"], 2 + (2 + 12) / 4),
    ],
)
def test_memory_of_four_ranks_by_zero_stage(run: Run, overrides: list[str], bytes_a_parameter: float) -> None:
    config = run.config(*overrides)
    assert plan.memory_bytes(config, 4) == bytes_a_parameter * plan.parameters(config)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ([], 2 + 1),
        (["train.steps=7"], 3 + 1),
        (["train.keep_last_checkpoints=1"], 1 + 1),
        (["train.keep_last_checkpoints=1", "train.keep_best_checkpoint=true", "train.steps=30"], 2 + 1),
        (["train.keep_last_checkpoints=1", "train.keep_every_steps=6", "train.steps=30"], 1 + 5 + 1),
        (["train.keep_last_checkpoints=9"], 2 + 1),
    ],
)
def test_checkpoints_to_come(run: Run, overrides: list[str], count: int) -> None:
    assert disk.checkpoints_to_come(run.config(*overrides)) == count


def test_disks(run: Run) -> None:
    config = run.config()
    one = disk.checkpoint_bytes(config)
    assert one == 16 * plan.parameters(config)

    def verdict(*free: float) -> Finding:
        seen = [(2 * host, disk.Disk(True, int(one * room), 1e9, "")) for host, room in enumerate(free)]
        return disk.judge(seen, config, NODES)

    assert verdict(9, 9).level == OK
    assert verdict(9, 2.5).level == WARN
    assert verdict(9, 0.5).level == FAIL
    apart = disk.judge([(0, disk.Disk(True, one, 1e9, "")), (2, disk.Disk(False, 0, 0, ""))], config, NODES)
    assert (apart.level, apart.unfit) == (FAIL, (2,))
    assert "does not show there what rank 0 wrote" in apart.measured


def test_names() -> None:
    assert named([3], NODES) == "rank 3 on b"
    assert named(range(10), ["x"] * 10).endswith("7 on x and 2 more")
    assert [amount(value, "B") for value in (0, 999, 1234, 5e13)] == ["0 B", "999 B", "1.23 kB", "50 TB"]


def test_one_line_of_all_failures_with_each_way_out_once(tmp_path: Path) -> None:
    findings = [
        Finding("gemm", FAIL, "rank 3 is unfit: slow", "exclude b", (3,)),
        Finding("clock", WARN, "off", "start NTP"),
        Finding("ring", FAIL, "rank 3 is unfit: slow too", "exclude b", (3,)),
    ]
    assert complaint(findings) == "gemm: rank 3 is unfit: slow; ring: rank 3 is unfit: slow too; exclude b"
    told = report(findings, NODES)
    assert (told["fit"], told["unfit_ranks"], told["exclude"]) == (False, [3], ["b"])
    assert complaint(findings[1:2]) == ""
    assert report(findings[1:2], NODES)["fit"]
