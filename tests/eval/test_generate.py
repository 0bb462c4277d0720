"""Text token by token equals reading the whole context again for every token."""

import itertools

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.eval import generate


@pytest.mark.parametrize("mixer", ["tssa", "softmax"])
def test_steps_equal_reading_again(trained: dict[str, Run], mixer: str) -> None:
    checkpoint = load_checkpoint(trained[mixer].dir)
    prompt = [checkpoint.tokenizer.eos_id, *checkpoint.tokenizer.encode("Fellow citizens")]
    written = list(
        itertools.islice(generate(checkpoint.lm, prompt, checkpoint.tokenizer.vocab_size, temperature=0), 20)
    )
    context = list(prompt)
    for token in written:
        logits, _ = checkpoint.lm(torch.tensor([context]))
        assert token == int(logits[0, -1].argmax())
        context.append(token)


def test_sampling_is_seeded_and_top_k_narrows_it(trained: dict[str, Run]) -> None:
    lm = load_checkpoint(trained["tssa"].dir).lm

    def text(temperature: float = 1.0, top_k: int | None = None, seed: int = 0) -> list[int]:
        return list(itertools.islice(generate(lm, [1], 512, temperature=temperature, top_k=top_k, seed=seed), 30))

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=1) == text(temperature=0)


def test_rows_beyond_the_tokenizer_are_never_written(trained: dict[str, Run]) -> None:
    lm = load_checkpoint(trained["tssa"].dir).lm
    assert set(itertools.islice(generate(lm, [1], 7, temperature=5.0), 100)) <= set(range(7))


def test_the_subcommand(trained: dict[str, Run]) -> None:
    run = str(trained["softmax"].dir)
    assert succeed(tostlm("generate", run, "--prompt", "Fellow citizens", "--tokens", "8")).startswith(
        "Fellow citizens"
    )
    fail(tostlm("generate", run, "--tokens", "80"), "longer than the model's 64 positions", "at most 64 --tokens")
    tost = str(trained["tssa"].dir)
    assert succeed(tostlm("generate", tost, "--tokens", "80")).strip()
