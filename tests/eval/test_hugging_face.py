"""Hugging Face models beside checkpoints: the same losses, on the same text, whatever their tokens."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import Run, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import convert, write_hf
from tostlm.data import VALIDATION, Targets, Tokenizer, TokenSet, choose_targets, import_tokenizer
from tostlm.eval import PROTOCOLS, EvalSettings, evaluate_perplexity
from tostlm.eval.models import open_model
from tostlm.eval.text import Retokenized


@pytest.fixture(scope="module")
def tokens(data: Path) -> TokenSet:
    return TokenSet(data, VALIDATION)


@pytest.fixture(scope="module")
def other(speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of transformers, with random weights and byte-level tokens of its own."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer_kinds.byte_level(speeches, ["<|endoftext|>"]).save(str(folder / "tokenizer.json"))
    vocabulary = import_tokenizer(folder).vocab_size
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def scores(out: Path) -> list[list[dict[str, Any]]]:
    return [model["scores"] for model in json.loads((out / "perplexity.json").read_text())["models"]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("mixer", ["tssa", "softmax"])
def test_an_export_has_its_checkpoints_losses(
    trained: dict[str, Run], tmp_path: Path, mixer: str, protocol: str
) -> None:
    convert(load_checkpoint(trained[mixer].dir), tmp_path / "hf", write_hf)
    settings = EvalSettings([16, 64], protocol, windows=6, trust_code=mixer == "tssa")
    evaluate_perplexity([trained[mixer].dir, tmp_path / "hf"], [], settings, tmp_path)
    for own, theirs in zip(*scores(tmp_path), strict=True):
        assert theirs["nats"] == pytest.approx(own["nats"], abs=1e-5)
        assert (theirs["tokens"], theirs["documents"]) == (own["tokens"], own["documents"])
        assert theirs["bits_per_byte"] == pytest.approx(own["bits_per_byte"], abs=1e-5)


@torch.no_grad()
def test_another_model_has_transformers_own_loss(other: Path, tokens: TokenSet, data: Path, tmp_path: Path) -> None:
    evaluate_perplexity([other], [data], EvalSettings([64], "windows", windows=5, pass_tokens=100), tmp_path)
    ((found,),) = scores(tmp_path)
    text = Retokenized(tokens, import_tokenizer(other))
    starts = np.unique(np.linspace(0, (len(text) - 2) // 64, 5).round().astype(int)) * 64
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    nats = count = 0.0
    for start in starts.tolist():
        ids = torch.from_numpy(text.read(start, start + 65))[None]
        loss = model(ids[:, :-1], labels=ids[:, :-1]).loss  # of all but the first and the last, which is beyond
        last = torch.log_softmax(model(ids[:, :-1]).logits[0, -1], -1)[ids[0, -1]]
        nats, count = nats + float(loss) * (ids.shape[1] - 2) - float(last), count + ids.shape[1] - 1
    assert found["nats"] == pytest.approx(nats / count, abs=1e-5)
    assert found["tokens"] == count


def test_the_same_text_is_scored_in_other_tokens(other: Path, tokens: TokenSet) -> None:
    own, tokenizer = Tokenizer.from_folder(tokens.folder), import_tokenizer(other)
    text, targets = Retokenized(tokens, tokenizer), choose_targets(tokens, [64], 20)
    for end, (first, stop) in zip(targets.ends, text.spans(targets), strict=True):
        expected = own.decode(tokens.read(end - targets.span, end).tolist())
        found = tokenizer.decode(text.read(first, stop).tolist())
        assert found.strip() in expected or expected.strip() in found or _overlap(found, expected)


def _overlap(one: str, other: str) -> bool:
    """Whether the texts are the same but for a token at either edge."""
    middle = one.strip()[8:-8]
    return middle in other


def test_other_tokens_have_the_same_targets_at_every_context(
    other: Path, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a span is longer in a model's own tokens than the shortest context, as with bytes."""
    text = Retokenized(tokens, import_tokenizer(other))
    found = text.spans
    monkeypatch.setattr(text, "spans", lambda targets: [(first - 9, end) for first, end in found(targets)])
    for limit in (None, 64):
        passages = list(PROTOCOLS["same-targets"](tokens, text, [4, 16, 64], 30, limit))
        by_context = [[(p.end, p.scored) for p in passages if p.contexts == (context,)] for context in (4, 16, 64)]
        assert by_context[0] == by_context[1] == by_context[2]
        assert max(scored for _, scored in by_context[0]) > 4
        assert all(p.start < p.end - p.scored and (limit is None or p.end - p.start - 1 <= limit) for p in passages)
    begun = {max(0, int(first) - 1) for first, _ in text.document_bounds}
    for passage in PROTOCOLS["same-targets"](tokens, text, [4, 16, 64], 30, None):
        before = passage.end - passage.scored - passage.start
        assert before == passage.contexts[0] - 2 + 1 or passage.start in begun


def test_reports_beside_a_model_do_not_change_it(other: Path, data: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(other, tmp_path / "model"))
    before = open_model(folder, torch.device("cpu"), None).content
    evaluate_perplexity([folder], [data], EvalSettings([16], windows=2), None)
    assert open_model(folder, torch.device("cpu"), None).content == before
    weights = folder / "model.safetensors"
    os.utime(weights, (0, 0))
    assert open_model(folder, torch.device("cpu"), None).content != before


def test_whole_documents_are_the_same_text(other: Path, tokens: TokenSet) -> None:
    own, tokenizer = Tokenizer.from_folder(tokens.folder), import_tokenizer(other)
    text = Retokenized(tokens, tokenizer)
    for theirs, (first, stop) in zip(text.document_bounds.tolist(), tokens.document_bounds.tolist(), strict=True):
        assert tokenizer.decode(text.read(*theirs).tolist()) == own.decode(tokens.read(first, stop).tolist())
        whole = Targets([stop - 1], stop - first - 2)  # without the first token and the document's end
        ((begin, end),) = text.spans(whole)
        assert theirs[0] <= begin <= theirs[0] + 8 and end == theirs[1] - 1


def test_mistakes(trained: dict[str, Run], other: Path, data: Path, tmp_path: Path) -> None:
    command = ("eval", "perplexity", "--contexts", "16", "--windows", "2")
    fail(tostlm(*command, str(other)), "no checkpoint says what text to score; name a prepared folder with --data")
    fail(tostlm(*command[:3], "128", str(other), "--data", str(data)), "has 64 positions, fewer than the shortest of")
    convert(load_checkpoint(trained["tssa"].dir), tmp_path / "hf", write_hf)
    fail(tostlm(*command, str(tmp_path / "hf"), "--data", str(data)), "has code of its own; read it, then pass --trust")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    fail(tostlm(*command, str(tmp_path / "broken"), "--data", str(data)), "transformers cannot load")
    printed = succeed(tostlm(*command, str(trained["tssa"].dir), str(other), "--out", str(tmp_path / "out")))
    assert f"{other.name} has 64 learned positions" in printed
