"""Findings from measured numbers: which ranks are slow, wrong or skewed, and what the messages say."""

from pathlib import Path

import pytest
import torch

from tests.conftest import Run
from tostlm.doctor import hardware, network, run_inputs
from tostlm.doctor.findings import Finding, Speed, build_report, format_quantity, format_ranks, summarize_failures
from tostlm.launch import RankInfo
from tostlm.plan import checkpoint_bytes, total_parameters

NODES = ["a", "a", "b", "b", "c", "c"]
CPU = hardware.Device("cpu", "EPYC", 10**9, True, "", 0)


def gpu(number: int, name: str = "H100", supports_dtype: bool = True, visible: int = 2) -> hardware.Device:
    return hardware.Device("cuda", name, 80 * 10**9, supports_dtype, f"GPU-{number}", visible)


def check_gemms(*speeds: float) -> list[Finding]:
    return hardware.check_gemms(torch.float32, [Speed(speed) for speed in speeds], NODES)


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
    (found,) = check_gemms(*speeds)
    assert found.unhealthy_ranks == slow
    assert found.level == ("FAIL" if slow else "ok")


def test_a_slow_rank_is_reported_with_its_fraction_of_the_median() -> None:
    (found,) = check_gemms(1e13, 1e13, 1e13, 3.1e12, 1e13, 1e13)
    assert found.measured == "rank 3 on b is unhealthy: 0.31 of the median 10 TFLOP/s float32"
    assert found.remedy == "exclude b"


@pytest.mark.parametrize("wrong", [[5], [0, 2]])
def test_ranks_with_wrong_products_fail(wrong: list[int]) -> None:
    gemms = [Speed(1.0, "matrix products are off" if rank in wrong else "") for rank in range(6)]
    (found,) = hardware.check_gemms(torch.bfloat16, gemms, NODES)
    assert (found.level, found.unhealthy_ranks) == ("FAIL", tuple(wrong))
    assert "unhealthy: matrix products are off" in found.measured


@pytest.mark.parametrize(
    ("factors", "fault"),
    [
        ([1.0], ""),
        ([1.1], "matrix products are off by"),
        ([float("nan")], "matrix products are off by nan times"),
        ([1.0] * 7 + [1.0, 1.01], "repeating a matrix product gives other bits"),
    ],
    ids=["right", "off", "nan", "nondeterministic"],
)
@pytest.mark.parametrize("precision", [[], ["deepspeed.bf16.enabled=true"]], ids=["fp32", "bf16"])
def test_faults_of_products(
    run: Run, factors: list[float], fault: str, precision: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later products are multiplied by the last factor."""
    matmul, rest = torch.matmul, iter(factors)
    monkeypatch.setattr(torch, "matmul", lambda a, b: matmul(a, b) * next(rest, factors[-1]))
    monkeypatch.setattr(hardware, "WINDOW_SECONDS", 0.001)
    found = hardware.measure_gemm(run.config(*precision), RankInfo(0, 0, 1))
    assert found.fault.startswith(fault) and bool(found.fault) == bool(fault)
    assert found.per_second > 0


def test_rounds_combine_to_the_best_speed_and_any_fault() -> None:
    assert Speed(1).combine(Speed(3)).combine(Speed(2)) == Speed(3)
    assert Speed(9, "wrong").combine(Speed(1)) == Speed(1).combine(Speed(9, "wrong")) == Speed(9, "wrong")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_here_are_within_rounding(dtype: torch.dtype) -> None:
    assert 0.001 < hardware.gemm_error(torch.device("cpu"), dtype) < 1


def test_wrong_sums_name_the_rank_unless_all_are_wrong() -> None:
    right, wrong = ({1_000_000: Speed(1e9, fault)} for fault in ("", "wrong"))
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
    (found,) = network.check_links([Speed(rate) for rate in rates], NODES)
    assert {NODES[rank] for rank in found.unhealthy_ranks} == exclude
    assert found.level == ("FAIL" if exclude else "ok")


def test_two_links_are_not_compared() -> None:
    assert network.check_links([Speed(1), Speed(100)], ["a", "a"])[0].level == "ok"


def test_a_damaged_message_names_both_ends() -> None:
    found, *_ = network.check_links([Speed(1), Speed(1), Speed(1, "messages arrive damaged")], NODES)
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
        (["model.width=4096"], [CPU] * 2, "FAIL", "of 500 MB per rank"),
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
    one = checkpoint_bytes(config)
    assert one == 16 * total_parameters(config)

    def finding(*free: float) -> Finding:
        seen = {2 * host: run_inputs.Disk(True, int(one * share), 1e9, "") for host, share in enumerate(free)}
        return run_inputs.check_disk(seen, config, NODES)

    assert finding(9, 9).level == "ok"
    assert finding(9, 2.5).level == "warn"
    assert finding(9, 0.5).level == "FAIL"
    disks = {0: run_inputs.Disk(True, one, 1e9), 2: run_inputs.Disk(False)}
    not_shared = run_inputs.check_disk(disks, config, NODES)
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
