"""Windows cover exactly the tokens they should, in order."""

from pathlib import Path

import numpy as np
import pytest

from tostlm.data import TRAIN, PreparationSettings, Tokenizer, TokenSet, import_tokens, prepare
from tostlm.data.loading.token_set import Windows
from tostlm.errors import UserError


@pytest.fixture(params=[100_000_000, 7000], ids=["one shard", "many shards"])
def tokens(request: pytest.FixtureRequest, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> TokenSet:
    settings = PreparationSettings(sources=(str(corpus),), heldout_fraction=0.2, shard_tokens=request.param)
    prepare(settings, tokenizer, tmp_path / "out")
    return TokenSet(tmp_path / "out", TRAIN)


def rows(windows: Windows) -> np.ndarray:
    return np.stack([windows[number] for number in range(len(windows))])


def windows_within_documents(tokens: TokenSet, context: int) -> np.ndarray:
    """Cut windows document by document, each with the end-of-document token before it."""
    found = []
    for first, stop in tokens.document_bounds.tolist():
        start = max(0, first - 1)
        while start + context + 1 <= stop:
            found.append(tokens.read(start, start + context + 1))
            start += context
    return np.stack(found)


@pytest.mark.parametrize("context", [64, 1000])
def test_stream_windows_cover_all_tokens_but_a_rest_shorter_than_a_window(tokens: TokenSet, context: int) -> None:
    found = rows(Windows(tokens, context, within_documents=False))
    assert np.array_equal(found[:, :-1].ravel(), tokens.read(0, len(found) * context))
    assert np.array_equal(found[:, 1:].ravel(), tokens.read(1, len(found) * context + 1))
    assert len(tokens) - 1 - len(found) * context < context


@pytest.mark.parametrize("context", [16, 64, 1000, 2500])
def test_document_windows_lie_within_one_document(tokens: TokenSet, context: int) -> None:
    found = rows(Windows(tokens, context, within_documents=True))
    assert np.array_equal(found, windows_within_documents(tokens, context))
    ends = found == tokens.manifest.eos_id
    assert ends[:, 0].any()  # before a document
    assert not ends[:, 1:-1].any()


def test_a_context_may_be_as_long_as_the_longest_document_and_no_longer(tokens: TokenSet) -> None:
    lengths = np.diff(tokens.document_bounds)[:, 0]
    windows = Windows(tokens, int(lengths.max()), within_documents=True)
    assert len(windows) == (lengths == lengths.max()).sum()
    with pytest.raises(UserError) as error:
        Windows(tokens, int(lengths.max()) + 1, within_documents=True)
    assert "no document of the train split of" in str(error.value)
    assert f"a window of {lengths.max() + 1} tokens (the longest has {lengths.max()}, its end" in str(error.value)


def test_windows_of_a_million_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Two of three documents are long enough, and each is in a shard of its own."""
    context = 1 << 20
    lengths = (1_500_000, 200_000, context)
    texts = [np.random.default_rng(length).integers(2, tokenizer.vocab_size, length) for length in lengths]
    ids = np.concatenate([np.append(text, tokenizer.eos_id) for text in texts])
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    import_tokens(
        "nanogpt", [tmp_path / "train.bin"], [], tokenizer, tmp_path / "out", heldout_fraction=0, shard_tokens=1_000_000
    )
    windows = Windows(TokenSet(tmp_path / "out", TRAIN), context, within_documents=True)
    assert len(windows) == 2
    assert np.array_equal(windows[0], ids[: context + 1])
    assert np.array_equal(windows[1], ids[1_700_001 : 1_700_001 + context + 1])
