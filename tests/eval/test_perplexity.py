"""The same target tokens at every context, scored as a plain loop would."""

import csv
import importlib.util
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.data import VALIDATION, PreparationSettings, TokenSet, choose_targets, prepare, train_tokenizer
from tostlm.errors import UserError
from tostlm.eval import PROTOCOLS, EvalSettings, TostModel, evaluate, evaluate_perplexity, score_contexts
from tostlm.eval.finished import FILE
from tostlm.eval.perplexity import measure
from tostlm.eval.report import read_report
from tostlm.eval.token_scores import token_scores
from tostlm.files import locked, short_names

CONTEXTS = [16, 64, 512]
SETTINGS = EvalSettings([32], windows=2)


@pytest.fixture(scope="module")
def tokens(data: Path) -> TokenSet:
    return TokenSet(data, VALIDATION)


def test_targets_have_the_longest_context_in_their_document(tokens: TokenSet) -> None:
    targets = choose_targets(tokens, CONTEXTS, windows=50)
    assert targets.span == 8
    assert len(targets.ends) == len(set(targets.ends)) == 50
    documents = set()
    for end in targets.ends:
        (document,) = [n for n, (first, stop) in enumerate(tokens.document_bounds) if first < end <= stop]
        assert end - 1 - tokens.document_bounds[document][0] >= 512
        documents.add(document)
    assert len(documents) > 3
    assert all(later - earlier >= 8 for earlier, later in zip(targets.ends, targets.ends[1:], strict=False))


def test_scores_are_what_a_plain_loop_finds(trained: dict[str, Run], tokens: TokenSet) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    targets = choose_targets(tokens, CONTEXTS, windows=5)
    scores = list(score_contexts(TostModel(checkpoint), tokens, targets, CONTEXTS))
    assert [score.context for score in scores] == CONTEXTS
    for score in scores:
        nats, scored = 0.0, []
        for end in targets.ends:
            window = torch.from_numpy(tokens.read(end - score.context - 1, end))
            logits, _ = checkpoint.lm(window[None, :-1])
            nats += float(F.cross_entropy(logits[0, -8:], window[-8:], reduction="sum"))
            scored += window[-8:].tolist()
        text_bytes = sum(len(checkpoint.tokenizer.decode([t]).encode(errors="ignore")) for t in scored if t != 1)
        assert score.nats == pytest.approx(nats / 40, rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(nats / 40), rel=1e-5)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_gpt2_stops_at_its_positions(trained: dict[str, Run], tokens: TokenSet) -> None:
    targets = choose_targets(tokens, CONTEXTS, windows=5)
    scores = score_contexts(TostModel(load_checkpoint(trained["softmax"].dir)), tokens, targets, CONTEXTS)
    assert [score.context for score in scores] == [16, 64]


def test_no_document_is_long_enough(tokens: TokenSet) -> None:
    with pytest.raises(
        UserError, match=r"longer than 90000 tokens \(the longest has \d+; longer are \d+ than 16, 0 than 90,000"
    ):
        choose_targets(tokens, [16, 90_000], windows=5)


def test_the_subcommand(trained: dict[str, Run], tmp_path: Path) -> None:
    paths = [str(trained[mixer].dir) for mixer in ("tssa", "softmax")]
    command = [
        "eval",
        "perplexity",
        *paths,
        "--contexts",
        "512,16,64",
        "--windows",
        "7",
        "--out",
        str(tmp_path / "out"),
    ]
    printed = succeed(tostlm(*command))
    assert "beyond its positions" in printed
    tost, gpt2 = short_names([Path(path) for path in paths])
    assert f"{gpt2} has 64 learned positions and reads no further" in printed
    report = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert report["protocol"] == "same-targets"
    assert {score["tokens"] for model in report["models"] for score in model["scores"]} == {56}
    assert [[score["context"] for score in model["scores"]] for model in report["models"]] == [CONTEXTS, [16, 64]]
    with (tmp_path / "out" / "perplexity.csv").open() as file:
        rows = list(csv.DictReader(file))
    scored = [(tost, "16"), (tost, "64"), (tost, "512"), (gpt2, "16"), (gpt2, "64")]
    assert [(row["model"], row["context"]) for row in rows] == scored
    assert f"{float(rows[2]['perplexity']):.2f}" in printed
    assert (tmp_path / "out" / "perplexity.png").read_bytes().startswith(b"\x89PNG")


def test_learned_positions_are_clamped_on_request(trained: dict[str, Run], tmp_path: Path) -> None:
    command = ("eval", "perplexity", str(trained["softmax"].dir), "--contexts", "16,64,512", "--windows", "7")
    within = succeed(tostlm(*command, "--out", str(tmp_path / "within")))
    beyond = succeed(tostlm(*command, "--out", str(tmp_path / "beyond"), "--clamp-positions"))
    said = "run has 64 learned positions; beyond them every token had the last one"
    assert said in beyond and said not in within
    refused, clamped = (
        json.loads((tmp_path / out / "perplexity.json").read_text())["models"][0] for out in ("within", "beyond")
    )
    assert (refused["clamped"], refused["positions"]) == (None, 64)
    assert (clamped["clamped"], clamped["positions"]) == (64, None)
    assert [score["context"] for score in clamped["scores"]] == CONTEXTS
    assert [s["nats"] for s in clamped["scores"][:2]] == pytest.approx([s["nats"] for s in refused["scores"]])


def test_two_evaluations_into_one_folder(trained: dict[str, Run], tmp_path: Path) -> None:
    with locked(tmp_path / ".perplexity.lock", "held"), pytest.raises(UserError, match="another evaluation writes to"):
        evaluate_perplexity([trained["tssa"].dir], [], SETTINGS, tmp_path)


@pytest.mark.parametrize("content", [5, [5], [{}], [{"documents": [10**6]}], [{"nats": [math.nan]}, {"nats": ["x"]}]])
def test_a_partial_file_that_was_changed_is_measured_anew(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: object
) -> None:
    monkeypatch.setattr(evaluate.Finished, "forget", lambda self: None)
    run, (settings, expected) = [trained["tssa"].dir], (SETTINGS, tmp_path / "perplexity.json")
    evaluate_perplexity(run, [], settings, tmp_path)
    partial, first = json.loads((tmp_path / FILE).read_text()), expected.read_text()
    (name,) = partial["found"]
    whole = partial["found"][name][0]
    changed = [{**whole, **each} for each in content] if isinstance(content, list) and content != [5] else content
    (tmp_path / FILE).write_text(json.dumps({**partial, "found": {name: changed}}))
    evaluate_perplexity(run, [], settings, tmp_path)
    assert json.loads(expected.read_text()) == json.loads(first)


def test_losses_without_a_perplexity(trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 800 nats no float holds the exponential."""
    monkeypatch.setattr(TostModel, "score", lambda self, rows, scored, *_: torch.full((len(rows), scored), 800.0))
    printed = evaluate_perplexity([trained["tssa"].dir], [], SETTINGS, tmp_path)
    assert "inf" in printed
    written = (tmp_path / "perplexity.json").read_text()
    assert "Infinity" not in written and json.loads(written)["models"][0]["scores"][0]["perplexity"] is None
    (model,) = read_report(tmp_path / "perplexity.json")[1]
    assert model.scores[0].perplexity == math.inf


def test_mistakes(trained: dict[str, Run], tmp_path: Path) -> None:
    tssa, softmax = str(trained["tssa"].dir), str(trained["softmax"].dir)
    fail(tostlm("eval", "perplexity", str(tmp_path)), "neither a checkpoint nor the folder of a run")
    fail(tostlm("eval", "perplexity", tssa, "--contexts", "16,x"), "--contexts '16,x' must be whole numbers")
    fail(tostlm("eval", "perplexity", softmax, "--contexts", "128,256"), "has 64 positions, fewer than the shortest")
    fail(tostlm("eval", "perplexity", tssa, "--out", "/proc/no"), "cannot write in /proc/no")
    fail(tostlm("eval", "perplexity", tssa, "--protocol", "best"), "--protocol best is not known; it is one of same-t")
    fail(tostlm("eval", "perplexity", tssa, "--device", "tpu"), "there is no device tpu here; use cpu")
    fail(tostlm("eval", "perplexity", tssa, "--dtype", "fp8"), "dtype fp8 is not known; it is one of fp32, bf16, fp16")
    cut = Path(shutil.copytree(load_checkpoint(trained["tssa"].dir).path, tmp_path / "cut"))
    content = (cut / "weights.safetensors").read_bytes()
    (cut / "weights.safetensors").write_bytes(content[:-2] + bytes([content[-2] ^ 1, content[-1]]))
    convert = ["convert", str(cut), str(tmp_path / "hf"), "--to", "hf"]
    for command in (["eval", "perplexity", str(cut)], ["generate", str(cut)], convert):
        fail(tostlm(*command), f"checkpoint {cut} is damaged: weights.safetensors has another checksum")
    os.truncate(cut / "weights.safetensors", 3000)
    fail(
        tostlm("eval", "perplexity", str(cut)), f"checkpoint {cut} is damaged: weights.safetensors has 3000 bytes, not"
    )
    (cut / "weights.safetensors").write_bytes(content)
    (cut / "tokenizer.model").unlink()
    fail(tostlm("eval", "perplexity", str(cut)), "is damaged: tokenizer.model is missing")
    (cut / "COMPLETE").unlink()
    fail(tostlm("eval", "perplexity", str(cut)), "has no readable COMPLETE; copy it again, whole")


def test_a_moved_run_reports_where_it_is(trained: dict[str, Run], tmp_path: Path) -> None:
    moved = Path(shutil.copytree(trained["tssa"].dir, tmp_path / "moved"))
    printed = succeed(tostlm("eval", "perplexity", str(moved), "--contexts", "16", "--windows", "2"))
    assert f"written to {moved}/perplexity.json" in printed
    assert (moved / "perplexity.png").exists()


def test_as_many_windows_as_a_small_error_takes(trained: dict[str, Run], tokens: TokenSet, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    evaluate.evaluate_perplexity([trained["tssa"].dir], [], EvalSettings([64], dtype=torch.bfloat16), tmp_path)
    found = json.loads((tmp_path / "perplexity.json").read_text())
    ((score,),) = [model["scores"] for model in found["models"]]
    assert found["dtype"] == "bfloat16"
    assert score["low"] < score["nats"] < score["high"]
    ends = choose_targets(tokens, [64], score["tokens"] // 32).ends
    rows = torch.stack([torch.from_numpy(tokens.read(end - 65, end)) for end in ends])
    means = token_scores(checkpoint.lm, rows, 32).mean(1)
    assert float(means.std()) / len(means) ** 0.5 == pytest.approx(0.01, rel=0.3)


def test_several_sets_and_what_contexts_are_worth(trained: dict[str, Run], data: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    sets = [argument for folder in (data, copy) for argument in ("--data", str(folder))]
    tssa, out = str(trained["tssa"].dir), tmp_path / "out"
    printed = succeed(
        tostlm("eval", "perplexity", tssa, *sets, "--contexts", "16,1k", "--windows", "9", "--out", str(out))
    )
    assert printed.count("same-targets: 72 tokens of") == 2
    found = json.loads((out / "perplexity.json").read_text())["models"]
    assert [model["data"] for model in found] == [str(data), str(copy)]
    assert found[0]["scores"] == found[1]["scores"]
    short, long = found[0]["scores"]
    assert long["context"] == 1024 and short["gain"] is None
    assert long["gain"]["value"] == pytest.approx(short["nats"] - long["nats"])
    assert f"1,024: {long['gain']['value']:+.4f} ±" in printed


def test_processes_share_the_text(trained: dict[str, Run], tmp_path: Path) -> None:
    command = ["eval", "perplexity", str(trained["tssa"].dir), "--contexts", "16,512", "--windows", "11"]
    for protocol in PROTOCOLS:
        found = []
        for processes in (1, 2, 3):
            out = tmp_path / f"{protocol}-{processes}"
            succeed(tostlm(*command, "--protocol", protocol, "--out", str(out), "--nproc", str(processes)))
            found.append(json.loads((out / "perplexity.json").read_text())["models"][0]["scores"])
        for scores in found[1:]:
            for one, several in zip(found[0], scores, strict=True):
                assert several["nats"] == pytest.approx(one["nats"], abs=1e-9)
                assert (several["tokens"], several["documents"]) == (one["tokens"], one["documents"])
    fail(tostlm(*command, "--data", "nowhere", "--nproc", "2"), "nowhere holds no prepared data")


def test_what_is_finished_is_not_measured_again(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, path = EvalSettings([16, 32, 64], windows=3), trained["tssa"].dir
    asked: list[int] = []

    def count(model: TostModel, tokens: TokenSet, contexts: list[int], *rest: Any, **options: Any) -> Any:
        asked.append(*contexts)
        if asked == [16, 32]:
            raise KeyboardInterrupt
        return measure(model, tokens, contexts, *rest, **options)

    expected = evaluate.evaluate_perplexity([path], [], settings, tmp_path / "other")
    monkeypatch.setattr(evaluate, "measure", count)
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_perplexity([path], [], settings, tmp_path)
    assert (tmp_path / FILE).exists()
    found = evaluate.evaluate_perplexity([path], [], settings, tmp_path)
    assert asked == [16, 32, 32, 64]
    assert found.replace(str(tmp_path), "") == expected.replace(str(tmp_path / "other"), "")
    assert not (tmp_path / FILE).exists()

    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate.evaluate_perplexity([path], [], settings, tmp_path)
    evaluate.evaluate_perplexity([path], [], settings._replace(windows=4), tmp_path)  # another command
    assert asked == [16, 32, 16, 32, 64]


def test_data_of_another_tokenizer_is_the_same_text(
    trained: dict[str, Run], data: Path, corpus: Path, speeches: list[str], tmp_path: Path
) -> None:
    other = train_tokenizer(speeches, 500, tmp_path / "other.model")
    prepare(PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2), other, tmp_path / "other")
    settings = EvalSettings([64, 512], "stream", windows=5)
    evaluate.evaluate_perplexity([trained["tssa"].dir], [data, tmp_path / "other"], settings, tmp_path)
    own, others = (model["scores"] for model in json.loads((tmp_path / "perplexity.json").read_text())["models"])
    for one, two in zip(own, others, strict=True):
        assert two["nats"] == pytest.approx(one["nats"], abs=1e-6)
        assert {key: two[key] for key in ("tokens", "documents")} == {key: one[key] for key in ("tokens", "documents")}


def test_without_matplotlib_nothing_is_scored(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(evaluate, "measure", None)
    with pytest.raises(UserError, match=r"pip install 'tostlm\[eval\]'"):
        evaluate.evaluate_perplexity([trained["tssa"].dir], [], SETTINGS, tmp_path)
