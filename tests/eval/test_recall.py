"""What the probes of trained models ask, that models are read as anywhere else, and that a perfect memory shows."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.data import VALIDATION, Tokenizer, TokenSet
from tostlm.errors import UserError
from tostlm.eval import EvalSettings, TostModel, measure_recall
from tostlm.eval.models import ScoredModel
from tostlm.eval.probes import NEEDLE, PROBES, STATES, Material, Probe, recall
from tostlm.eval.recall import answer
from tostlm.eval.token_scores import TokenScore, nats


@pytest.fixture(scope="module")
def tokens(data: Path) -> TokenSet:
    return TokenSet(data, VALIDATION)


@pytest.fixture
def material(tokens: TokenSet) -> Material:
    return Material(Tokenizer.from_folder(tokens.folder), tokens, seed=3)


def marked(probe: Probe, mask: Tensor) -> list[list[int]]:
    return [row[1:][of_row].tolist() for row, of_row in zip(probe.rows, mask, strict=True)]


def test_recall_asks_for_each_value_after_its_key(material: Material) -> None:
    probe = recall(material, 6, 64, 5)
    for row, values, again in zip(probe.rows, marked(probe, probe.stated), marked(probe, probe.asked), strict=True):
        assert len(row) == 65
        first, last = row[1:11].tolist(), row[-10:].tolist()
        pairs = dict(zip(first[::2], first[1::2], strict=True))
        assert len(pairs) == 5 and pairs == dict(zip(last[::2], last[1::2], strict=True))
        assert (values, again) == (first[1::2], last[1::2])
    assert (probe.rows[:, -10:] != probe.rows[:, 1:11]).any()  # in another order


@pytest.mark.parametrize("length", [13, 64, 65])
def test_induction_asks_for_a_repeat(material: Material, length: int) -> None:
    probe = PROBES["induction"](material, 4, length)
    assert probe.rows.shape == (4, length + 1)
    assert marked(probe, probe.asked) == marked(probe, probe.stated)
    assert probe.asked.sum() == 4 * (length // 2 - 1)


def test_needles_lie_from_start_to_end(material: Material, tokens: TokenSet) -> None:
    probe = PROBES["needle"](material, 5, 64)
    assert marked(probe, probe.asked) == marked(probe, probe.stated)
    places = [int(of_row.nonzero()[0]) for of_row in probe.stated]
    assert places[0] == NEEDLE and places[-1] == 64 - 3 * NEEDLE and places == sorted(places)
    for row, place in zip(probe.rows, places, strict=True):
        assert torch.equal(row[1 + place - NEEDLE : 1 + place], row[-2 * NEEDLE : -NEEDLE])
    text = tokens.read(0, len(tokens)).tobytes()
    filler = torch.cat([probe.rows[2, 1 : 1 + places[2] - NEEDLE], probe.rows[2, 1 + places[2] + NEEDLE : -2 * NEEDLE]])
    assert filler.numpy().astype(tokens.read(0, 1).dtype).tobytes() in text


def test_material_is_text(material: Material, tokens: TokenSet) -> None:
    sizes = Tokenizer.from_folder(tokens.folder).token_bytes
    assert sizes[material.any(10, 50).numpy()].min() > 0
    assert all(len(set(row)) == 20 for row in material.distinct(10, 20).tolist())


class Memory(ScoredModel):
    """Predicts what followed the last time that the same two tokens were read, or the same one; else any alike."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.device = tokenizer, torch.device("cpu")
        self.path = self.folder = Path("memory")
        self.step = self.positions = None

    def score(self, rows: Tensor, scored: int, pass_tokens: int, score: TokenScore = nats) -> Tensor:
        logits = torch.zeros(*rows[:, 1:].shape, self.tokenizer.vocab_size)
        for b, row in enumerate(rows.tolist()):
            followed: dict[tuple[int, ...], int] = {}
            for t, (before, token, target) in enumerate(zip([-1, *row], row, row[1:], strict=False)):
                guess = followed.get((before, token), followed.get((token,)))
                if guess is not None:
                    logits[b, t, guess] = 20.0
                followed |= {(before, token): target, (token,): target}
        return score(logits[:, -scored:].flatten(0, 1), rows[:, -scored:].flatten()).unflatten(0, (len(rows), scored))

    @property
    def content(self) -> str:
        return "memory"


def test_a_perfect_memory_shows(tokens: TokenSet) -> None:
    tokenizer = Tokenizer.from_folder(tokens.folder)
    model = Memory(tokenizer)
    for task, load in (("recall", 4), ("induction", None), ("needle", None)):
        found = answer(model, tokens, task, load, 64, sequences=8, seed=0, pass_tokens=1 << 16)
        # A key may stand in the text between, or a token twice among random ones.
        assert found.accuracy > 0.8 and found.nats < 4.5, task
        assert found.first_nats is not None and found.first_nats > 4.5
        assert found.low is not None and found.high is not None and found.low <= found.accuracy <= found.high
    chain = answer(model, tokens, "chain", None, 256, sequences=8, seed=0, pass_tokens=1 << 16)
    assert chain.accuracy == pytest.approx(1 / STATES, abs=0.12)
    assert 1.2 < chain.best_nats < math.log(STATES) < chain.nats


class Bayes(Memory):
    """Predicts chains as well as possible: it counts."""

    def score(self, rows: Tensor, scored: int, pass_tokens: int, score: TokenScore = nats) -> Tensor:
        states = sorted(set(rows[:, 1:].flatten().tolist()))
        logits = torch.full((*rows[:, 1:].shape, self.tokenizer.vocab_size), -1e9)
        for b, row in enumerate(rows.tolist()):
            counts = {state: dict.fromkeys(states, 1.0) for state in states}
            for t, (token, target) in enumerate(pairwise(row)):
                seen = counts.get(token, dict.fromkeys(states, 1.0))
                logits[b, t, states] = torch.tensor(list(seen.values())).log()
                seen[target] += 1
        return score(logits.flatten(0, 1), rows[:, 1:].flatten()).unflatten(0, (len(rows), scored))


def test_counting_is_the_best_for_chains(tokens: TokenSet) -> None:
    model = Bayes(Tokenizer.from_folder(tokens.folder))
    found = answer(model, tokens, "chain", None, 200, sequences=4, seed=1, pass_tokens=1 << 16)
    assert found.nats == pytest.approx(found.best_nats, abs=1e-5)
    assert [end for end, _ in found.divergence] == [16, 32, 64, 128, 200]
    assert max(abs(nats) for _, nats in found.divergence) < 1e-5


@torch.no_grad()
def test_answers_are_those_of_the_parallel_forward(trained: dict[str, Run], tokens: TokenSet) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    found = answer(TostModel(checkpoint), tokens, "recall", 4, 40, sequences=5, seed=2, pass_tokens=64)
    probe = recall(Material(checkpoint.tokenizer, tokens, 2), 5, 40, 4)
    logits, _ = checkpoint.lm(probe.rows[:, :-1])
    losses = torch.nn.functional.cross_entropy(logits.mT, probe.rows[:, 1:], reduction="none")
    assert found.nats == pytest.approx(float(losses[probe.asked].mean()), abs=1e-5)
    assert found.first_nats == pytest.approx(float(losses[probe.stated].mean()), abs=1e-5)
    assert found.accuracy == float((logits.argmax(-1) == probe.rows[:, 1:])[probe.asked].double().mean())
    assert found.answers == 20


def test_the_subcommand(trained: dict[str, Run], tmp_path: Path) -> None:
    paths = [str(trained[mixer].dir) for mixer in ("tssa", "softmax")]
    options = ["--contexts", "32,128", "--pairs", "2,8,16", "--sequences", "3", "--out", str(tmp_path)]
    printed = succeed(tostlm("eval", "recall", *paths, *options))
    written = json.loads((tmp_path / "recall.json").read_text())
    tssa, gpt2 = written["models"]
    assert gpt2["positions"] == 64 and {found["tokens"] for found in gpt2["results"]} == {32}
    cases = [(found["task"], found["load"], found["tokens"]) for found in tssa["results"]]
    others = [("induction", None), ("needle", None), ("chain", None)]
    loads = [("recall", 2), ("recall", 8), ("recall", 16)]
    assert cases == [(*case, 32) for case in loads[:2] + others] + [(*case, 128) for case in loads + others]
    for found in tssa["results"]:
        assert f"{found['accuracy']:.1%} {found['nats']:.2f}" in printed
    assert f"{gpt2['name']} has 64 positions and reads no further" in printed
    again = succeed(tostlm("eval", "recall", *paths, *options))
    assert again == printed  # from the seed


def test_mistakes(trained: dict[str, Run], tokens: TokenSet, tmp_path: Path) -> None:
    command = ("eval", "recall", str(trained["tssa"].dir), "--sequences", "2")
    fail(tostlm(*command, "--contexts", "8"), "--contexts 8 is too short for a probe; use 13 tokens or more")
    fail(tostlm(*command, "--contexts", "64", "--pairs", "17"), "--pairs 17 takes 68 tokens, more than the longest")
    fail(tostlm(*command, "--contexts", "1M"), "fewer than a context of 1,048,576")
    fail(tostlm(*command, "--data", str(tmp_path)), str(tmp_path))
    assert "less than or equal to 9223372036854775807" in tostlm(*command, "--seed", "99999999999999999999").stderr
    with pytest.raises(UserError, match=r"--pairs 600 are more keys than .* has tokens"):
        measure_recall([trained["tssa"].dir], [], EvalSettings([2400]), [600], 1, 0, tmp_path)
