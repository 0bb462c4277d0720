"""Findings from measured numbers: which ranks are slow, wrong or skewed, and what the messages say."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tostlm.doctor import hardware, network, run_inputs
from tostlm.doctor.findings import Finding, build_report, format_quantity, format_ranks, summarize_failures

NODES = ["a", "a", "b", "b", "c", "c"]
CPU = hardware.Device("cpu", "EPYC", 10**9, True, "", 0)


def gpu(number: int, name: str = "H100", supports_dtype: bool = True, visible: int = 2) -> hardware.Device:
    return hardware.Device("cuda", name, 80 * 10**9, supports_dtype, f"GPU-{number}", visible)


def gemms(*speeds: float) -> list[hardware.Gemm]:
    return [hardware.Gemm("float32", 0.1, True, speed) for speed in speeds]


def links(*rates: float) -> list[network.Link]:
    return [network.Link(True, rate) for rate in rates]


def test_a_rank_with_another_version_is_unhealthy() -> None:
    own = {"torch": "2.13.0", "tostlm": "0.1.0"}
    assert run_inputs.check_versions([own] * 6, NODES).level == "ok"
    found = run_inputs.check_versions([own, own, own, {**own, "torch": "2.12.0"}, own, own], NODES)
    assert (found.level, found.unhealthy_ranks) == ("FAIL", (3,))
    assert found.measured == "rank 3 on b is unhealthy: torch is 2.12.0 on rank 3, elsewhere 2.13.0"
    assert found.remedy == "install the same there, or exclude b"


def test_of_two_versions_rank_0_has_the_right_one() -> None:
    assert run_inputs.check_versions([{"torch": "1"}, {"torch": "2"}], ["a", "b"]).unhealthy_ranks == (1,)


@pytest.mark.parametrize(
    ("found", "level", "words"),
    [
        ([CPU] * 4, "ok", "4 x EPYC on a, b"),
        ([gpu(0), gpu(1), gpu(2), gpu(3)], "ok", "4 x H100 on a, b"),
        ([gpu(0), gpu(1), gpu(2), CPU], "FAIL", "rank 3 on b is unhealthy: on EPYC, the others on H100"),
        ([gpu(0), gpu(1), gpu(2), gpu(2)], "FAIL", "ranks 2 on b, 3 on b share the GPU GPU-2"),
        ([gpu(0), gpu(1), gpu(2), gpu(3, name="A100")], "warn", "rank 3 on b: A100, elsewhere H100"),
        ([gpu(n, visible=8) for n in range(4)], "warn", "a has 8 GPUs and 2 ranks"),
    ],
)
def test_device_findings(found: list[hardware.Device], level: str, words: str) -> None:
    finding = hardware.check_devices(found, NODES[:4])
    assert (finding.level, finding.measured) == (level, words)


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
    (found,) = hardware.check_gemms(gemms(*speeds), NODES)
    assert found.unhealthy_ranks == slow
    assert found.level == ("FAIL" if slow else "ok")


def test_a_slow_rank_is_reported_with_its_fraction_of_the_median() -> None:
    (found,) = hardware.check_gemms(gemms(1e13, 1e13, 1e13, 3.1e12, 1e13, 1e13), NODES)
    assert found.measured == "rank 3 on b is unhealthy: 0.31 of the median 10 TFLOP/s float32"
    assert found.remedy == "exclude b"


@pytest.mark.parametrize(
    "wrong",
    [hardware.Gemm("bfloat16", 1.5, True, 1.0), hardware.Gemm("bfloat16", float("nan"), True, 1.0)],
    ids=["off", "nan"],
)
def test_wrong_products_fail(wrong: hardware.Gemm) -> None:
    (found,) = hardware.check_gemms([*gemms(1, 1, 1, 1, 1), wrong], NODES)
    assert (found.level, found.unhealthy_ranks) == ("FAIL", (5,))
    assert "off by" in found.measured


def test_nondeterministic_products_fail() -> None:
    nondeterministic = hardware.Gemm("float32", 0.1, False, 1.0)
    (found,) = hardware.check_gemms([nondeterministic, *gemms(1, 1)], NODES)
    assert found.unhealthy_ranks == (0,)
    assert "gives other bits" in found.measured


def test_rounds_combine_to_the_best_speed_and_the_worst_error() -> None:
    assert hardware.combine_gemms(gemms(1, 3, 2)).flops == 3
    assert not hardware.combine_gemms([*gemms(1), hardware.Gemm("float32", 0.1, False, 1.0)]).deterministic
    assert network.combine_links(links(1, 3, 2)) == network.Link(True, 3)
    assert not network.combine_links([network.Link(False, 9), *links(1)]).exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_here_are_within_rounding(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "WINDOW_SECONDS", 0.001)
    found = hardware.measure_gemm(dtype)
    assert 0.001 < found.worst_error < 1
    assert found.deterministic


def test_wrong_sums_name_the_rank_unless_all_are_wrong() -> None:
    right, wrong = (network.AllReduce(exact, ((1_000_000, 0.001),)) for exact in (True, False))
    assert "1 GB/s at 1 MB" in network.check_all_reduces([right, right], NODES).measured
    assert network.check_all_reduces([right, wrong, right], NODES).unhealthy_ranks == (1,)
    found = network.check_all_reduces([wrong, wrong], NODES)
    assert (found.level, found.unhealthy_ranks) == ("FAIL", ())


@pytest.mark.parametrize(
    ("rates", "exclude"),
    [
        # of rank n, the link from rank n - 1: ranks 0, 2 and 4 receive from another host
        ([1, 9, 1, 9, 1, 9], set()),
        ([1, 9, 1, 9, 0.4, 9], {"b", "c"}),
        ([1, 9, 0.4, 9, 0.4, 9], {"b"}),
        ([1, 9, 1, 4, 1, 9], {"b"}),
    ],
    ids=["links between hosts are slower", "one link", "both links of a host", "inside a host"],
)
def test_links_below_half_of_comparable_links_are_slow(rates: list[float], exclude: set[str]) -> None:
    (found,) = network.check_links(links(*rates), NODES)
    assert {NODES[rank] for rank in found.unhealthy_ranks} == exclude
    assert found.level == ("FAIL" if exclude else "ok")


def test_two_links_are_not_compared() -> None:
    assert network.check_links(links(1, 100), ["a", "a"])[0].level == "ok"


def test_a_damaged_message_names_both_ends() -> None:
    found, *_ = network.check_links([network.Link(True, 1), network.Link(True, 1), network.Link(False, 1)], NODES)
    assert found.measured == "ranks 1 on a, 2 on b are unhealthy: 1 on a -> 2 on b: messages arrive damaged"


@pytest.mark.parametrize(("ahead", "level"), [(0.9, "ok"), (1.1, "warn"), (-2.0, "warn")])
def test_clock_skew_above_a_second_warns(ahead: float, level: str) -> None:
    found = network.check_clocks([(0.0, 0.0), (ahead, 0.001)], ["a", "b"])
    assert found.level == level
    assert level == "ok" or f"rank 1 on b: {ahead:+.1f} s" in found.measured


def test_a_slow_round_trip_is_not_skew() -> None:
    assert network.check_clocks([(0.0, 0.0), (1.5, 2.0)], ["a", "b"]).level == "ok"


@pytest.mark.parametrize(
    ("overrides", "found", "level", "words"),
    [
        ([], [CPU] * 2, "ok", "8 sequences per step, 2 gradient accumulation steps; fp32, ZeRO stage 1"),
        ([], [CPU] * 3, "FAIL", "does not divide into 3 ranks"),
        (
            ["train.context_parallel_size=4"],
            [CPU] * 2,
            "FAIL",
            "2 ranks do not form whole groups of train.context_parallel_size 4",
        ),
        (
            ["deepspeed.bf16.enabled=true"],
            [gpu(0), gpu(1, supports_dtype=False)],
            "FAIL",
            "bf16, which rank 1 on a cannot",
        ),
        (
            ["deepspeed.fp16.enabled=true"],
            [CPU._replace(supports_dtype=False)] * 2,
            "FAIL",
            "fp16, which ranks 0 on a, 1 on a cannot",
        ),
        (["model.width=4096"], [CPU] * 2, "warn", "of 500 MB per rank"),
        (["model.width=4096"], [gpu(0), gpu(1)], "ok", "of 80 GB per rank"),
    ],
)
def test_config_against_devices(
    run: Run, overrides: list[str], found: list[hardware.Device], level: str, words: str
) -> None:
    finding = run_inputs.check_config(run.config(*overrides), found, NODES[: len(found)])
    assert finding.level == level
    assert words in finding.measured


@pytest.mark.parametrize(
    ("overrides", "bytes_per_parameter"),
    [
        (["deepspeed.zero_optimization.stage=0"], 4 + 4 + 8),
        (["deepspeed.zero_optimization.stage=1"], 4 + 4 + 8 / 4),
        (["deepspeed.zero_optimization.stage=2"], 4 + (4 + 8) / 4),
        (["deepspeed.zero_optimization.stage=3"], (4 + 4 + 8) / 4),
        (["deepspeed.zero_optimization.stage=2", "deepspeed.bf16.enabled=true"], 2 + (2 + 12) / 4),
    ],
)
def test_memory_of_four_ranks_by_zero_stage(run: Run, overrides: list[str], bytes_per_parameter: float) -> None:
    config = run.config(*overrides)
    assert run_inputs.model_memory_bytes(config, 4) == bytes_per_parameter * run_inputs.total_parameters(config)


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
    assert run_inputs.checkpoints_to_come(run.config(*overrides)) == count


def test_free_space_against_checkpoints(run: Run) -> None:
    config = run.config()
    one = run_inputs.checkpoint_bytes(config)
    assert one == 16 * run_inputs.total_parameters(config)

    def finding(*free: float) -> Finding:
        seen = [(2 * host, run_inputs.Disk(True, int(one * share), 1e9, "")) for host, share in enumerate(free)]
        return run_inputs.check_disk(seen, config, NODES)

    assert finding(9, 9).level == "ok"
    assert finding(9, 2.5).level == "warn"
    assert finding(9, 0.5).level == "FAIL"
    not_shared = run_inputs.check_disk(
        [(0, run_inputs.Disk(True, one, 1e9, "")), (2, run_inputs.Disk(False, 0, 0, ""))], config, NODES
    )
    assert (not_shared.level, not_shared.unhealthy_ranks) == ("FAIL", (2,))
    assert "does not show there what rank 0 wrote" in not_shared.measured


def test_formats() -> None:
    assert format_ranks([3], NODES) == "rank 3 on b"
    assert format_ranks(range(10), ["x"] * 10).endswith("7 on x and 2 more")
    assert [format_quantity(value, "B") for value in (0, 999, 1234, 5e13)] == ["0 B", "999 B", "1.23 kB", "50 TB"]


def test_failures_are_one_line_with_each_remedy_once(tmp_path: Path) -> None:
    findings = [
        Finding("gemm", "FAIL", "rank 3 is unhealthy: slow", "exclude b", (3,)),
        Finding("clock", "warn", "off", "start NTP"),
        Finding("ring", "FAIL", "rank 3 is unhealthy: slow too", "exclude b", (3,)),
    ]
    assert (
        summarize_failures(findings)
        == "gemm: rank 3 is unhealthy: slow; ring: rank 3 is unhealthy: slow too; exclude b"
    )
    content = build_report(findings, NODES)
    assert (content["healthy"], content["unhealthy_ranks"], content["exclude"]) == (False, [3], ["b"])
    assert summarize_failures(findings[1:2]) == ""
    assert build_report(findings[1:2], NODES)["healthy"]
