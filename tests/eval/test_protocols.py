"""Each protocol's scores against plain loops over whole sequences."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from tests.conftest import Run
from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.data import VALIDATION, PreparationSettings, TokenSet, prepare
from tostlm.errors import UserError
from tostlm.eval import TostModel
from tostlm.eval.perplexity import Score, Totals, gain, measure
from tostlm.eval.protocols import PROTOCOLS, stream, windows
from tostlm.eval.token_scores import token_scores


@pytest.fixture(scope="module")
def tokens(data: Path) -> TokenSet:
    return TokenSet(data, VALIDATION)


@pytest.fixture(scope="module", params=["tssa", "softmax"])
def checkpoint(trained: dict[str, Run], request: pytest.FixtureRequest) -> Checkpoint:
    return load_checkpoint(trained[request.param].dir)


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> TostModel:
    return TostModel(checkpoint)


def nats(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    logits, _ = checkpoint.lm(ids[None, :-1])
    return F.cross_entropy(logits[0], ids[1:], reduction="none").double()


@pytest.mark.parametrize("pass_tokens", [1, 7, 1000])
def test_losses_do_not_depend_on_how_they_are_read(checkpoint: Checkpoint, pass_tokens: int) -> None:
    rows = torch.randint(512, (3, 41), generator=torch.Generator().manual_seed(0))
    found = token_scores(checkpoint.lm, rows, 30, pass_tokens)
    expected = torch.stack([nats(checkpoint, row)[-30:] for row in rows])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_windows_are_the_whole_text_once(checkpoint: Checkpoint, model: TostModel, tokens: TokenSet) -> None:
    found = {}
    for context in (16, 48):
        (found[context],) = measure(model, tokens, [context], windows(tokens, tokens, [context], None), pass_tokens=100)
    text = torch.from_numpy(tokens.read(0, len(tokens)))
    for context, totals in found.items():
        starts = range(0, len(text) - 1, context)
        expected = sum(float(nats(checkpoint, text[start : start + context + 1]).sum()) for start in starts)
        assert totals.nats.sum() == pytest.approx(expected, rel=1e-5)
        assert totals.tokens.sum() == len(text) - 1


def test_a_stream_scores_each_token_at_the_number_before_it(
    checkpoint: Checkpoint, model: TostModel, tokens: TokenSet
) -> None:
    limit = checkpoint.config.model.positions
    contexts = [10, 40] + [600] * (limit is None)
    passages = list(stream(tokens, tokens, [10, 40, 600], 3, limit))
    assert {passage.contexts for passage in passages} == {tuple(contexts)}
    found = dict(zip(contexts, measure(model, tokens, contexts, passages, pass_tokens=64), strict=True))
    bounds = tokens.document_bounds
    chosen = [0, round((len(bounds) - 1) / 2), len(bounds) - 1]
    by_context = dict.fromkeys(contexts, 0.0)
    for document in chosen:
        first, stop = bounds[document].tolist()
        start = max(0, first - 1)
        ids = torch.from_numpy(tokens.read(start, min(stop, start + contexts[-1] + 1)))
        for before, loss in enumerate(nats(checkpoint, ids).tolist(), 1):
            by_context[min(c for c in contexts if c >= before)] += loss
    for context, totals in found.items():
        assert totals.nats.sum() == pytest.approx(by_context[context], rel=1e-5)
        assert list(totals.tokens.nonzero()[0]) == chosen


def test_words_and_bytes(checkpoint: Checkpoint, model: TostModel, tokens: TokenSet) -> None:
    """Over whole documents there are as many words as white space divides the text into."""
    whole = max(int(stop - first) for first, stop in tokens.document_bounds)
    context = min(whole, checkpoint.config.model.positions or whole)
    (totals,) = measure(model, tokens, [context], stream(tokens, tokens, [context], 2))
    words = text_bytes = 0
    for document in totals.tokens.nonzero()[0]:
        first, _ = tokens.document_bounds[document].tolist()
        words -= not first  # nothing is before the first token of all, so it is not scored
        text = checkpoint.tokenizer.decode(tokens.read(first, first + int(totals.tokens[document])).tolist())
        words, text_bytes = words + len(text.split()), text_bytes + len(text.encode())
    assert totals.words.sum() == words
    assert abs(totals.text_bytes.sum() - text_bytes) <= 2 * 4  # spaces before documents, characters that are cut
    score = Score.of(1, totals)
    assert score.word_perplexity == pytest.approx(math.exp(totals.nats.sum() / words))


def test_the_gain_of_a_context_is_over_the_same_documents() -> None:
    before, after = Totals.zeros(3), Totals.zeros(3)
    for document, (short, long) in enumerate([(5.0, 4.0), (90.0, 89.0)]):
        before.add(document, short, 10, 40, 8)
        after.add(document, long, 10, 40, 8)
    found = gain(before, after)
    assert found.value == pytest.approx(0.1) and found.low == pytest.approx(0.1) == found.high
    assert Score.of(64, after).low == pytest.approx(0.4)
    assert Score.of(64, after).documents == 2


def test_a_loss_that_is_no_number_is_named(trained: dict[str, Run], tokens: TokenSet) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    checkpoint.lm.norm.weight.fill_(math.nan)
    with pytest.raises(
        UserError, match=r"the loss of token 1 of the heldout split of .* is not finite, read from token 0"
    ):
        measure(TostModel(checkpoint), tokens, [16], windows(tokens, tokens, [16], 2))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_contexts_that_no_document_has(tokens: TokenSet, protocol: str) -> None:
    if protocol == "stream":  # which scores what there is
        assert list(PROTOCOLS[protocol](tokens, tokens, [10**7], 1, None))
        return
    with pytest.raises(UserError, match=r"10000000 tokens|no window of 10000000"):
        list(PROTOCOLS[protocol](tokens, tokens, [10**7], 1, None))


def test_words_are_counted_in_pieces(model: TostModel, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = list(stream(tokens, tokens, [64], 5))
    (whole,) = measure(model, tokens, [64], passages)
    for size in (2, 3, 50):
        monkeypatch.setattr("tostlm.eval.perplexity.DECODED_TOKENS", size)
        (pieces,) = measure(model, tokens, [64], passages)
        assert pieces.words.tolist() == whole.words.tolist()


def test_words_and_documents_are_counted_document_by_document(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Where a window has many: the words of each, and every one of them in the interval."""
    texts = ["A first text", "another one.", "two words", "one", "and the last of all"] * 5
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["train", *texts]))
    settings = PreparationSettings(sources=(str(tmp_path / "short.jsonl"),), heldout_fraction=0.97)
    prepare(settings, checkpoint.tokenizer, tmp_path / "data")
    tokens = TokenSet(tmp_path / "data", VALIDATION)
    decoded = [checkpoint.tokenizer.decode(tokens.read(*bounds).tolist()) for bounds in tokens.document_bounds.tolist()]
    (totals,) = measure(TostModel(checkpoint), tokens, [40], windows(tokens, tokens, [40], None))
    words = [len(text.split()) for text in decoded]
    assert totals.words.sum() == pytest.approx(sum(words), abs=1)  # the very first token is not scored
    assert totals.words[1:].tolist() == words[1:]
    lengths = np.diff(tokens.document_bounds, axis=1)[:, 0]
    assert totals.tokens[1:].tolist() == lengths[1:].tolist() and totals.tokens[0] == lengths[0] - 1
    assert Score.of(40, totals).documents == len(decoded)
