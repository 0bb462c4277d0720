"""Text token by token equals reading the whole context again for every token, however it is read, stored and joined."""

import copy
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.eval.generate import TextStream, prompt_tokens, write_batch
from tostlm.eval.sampling import Sampling, next_tokens
from tostlm.eval.writer import Writer

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module", params=["tssa", "softmax"])
def checkpoint(trained: dict[str, Run], request: pytest.FixtureRequest) -> Checkpoint:
    return load_checkpoint(trained[request.param].dir)


def writer_of(checkpoint: Checkpoint, sampling: Sampling = GREEDY, seed: int = 0) -> Writer:
    return Writer(checkpoint.lm, checkpoint.tokenizer.vocab_size, sampling, [seed])


def write(writer: Writer, tokens: int) -> list[int]:
    return [int(writer.write()[0]) for _ in range(tokens)]


def test_steps_equal_reading_again(checkpoint: Checkpoint) -> None:
    context = [checkpoint.tokenizer.eos_id, *checkpoint.tokenizer.encode("Fellow citizens")]
    writer = writer_of(checkpoint)
    writer.read(torch.tensor([context]))
    for token in write(writer, 20):
        logits, _ = checkpoint.lm(torch.tensor([context]))
        assert token == int(logits[0, -1].argmax())
        context.append(token)
    assert writer.tokens == len(context)


def test_a_stored_state_continues_as_if_nothing_had_been(checkpoint: Checkpoint, tmp_path: Path) -> None:
    sampling = Sampling(repetition_penalty=1.5)
    for read in (1, 9):
        whole, first = writer_of(checkpoint, sampling), writer_of(checkpoint, sampling)
        ids = torch.randint(512, (1, read), generator=torch.Generator().manual_seed(read))
        for writer in (whole, first):
            writer.read(ids)
        first.save(tmp_path / "state", "this")
        rest = writer_of(checkpoint, sampling)
        rest.restore(tmp_path / "state", "this")
        more = torch.tensor([[5, 6, 7]])
        for writer in (whole, rest):
            writer.read(more)
        assert rest.tokens == whole.tokens == read + 3
        assert write(rest, 8) == write(whole, 8)
        with pytest.raises(UserError, match=r"the state in .* is of another model"):
            rest.restore(tmp_path / "state", "other")
    (tmp_path / "state").write_bytes(b"no state")
    with pytest.raises(UserError, match="holds no state that this model could continue"):
        writer_of(checkpoint).restore(tmp_path / "state", "this")


def test_prompts_together_are_prompts_alone(checkpoint: Checkpoint) -> None:
    ids = [[1, 5, 9], [1, 6, 6], [1, 300, 2]]
    sampling, tokenizer = Sampling(temperature=0.9, top_k=40), checkpoint.tokenizer
    together = write_batch(checkpoint.lm, tokenizer, ids, 12, sampling, [3, 4, 5])
    alone = [
        write_batch(checkpoint.lm, tokenizer, [i], 12, sampling, [s])[0] for i, s in zip(ids, (3, 4, 5), strict=True)
    ]
    assert together == alone


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(logits: torch.Tensor, sampling: Sampling, seen: torch.Tensor | None = None) -> set[int]:
    rows = logits[None].expand(400, -1)
    mask = torch.zeros_like(rows, dtype=torch.bool) if seen is None else seen[None].expand(400, -1)
    return set(next_tokens(rows, mask, sampling, list(map(seeded, range(400)))).tolist())


def test_what_each_filter_leaves() -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.06, 0.04]).log()
    assert draw(logits, Sampling()) == {0, 1, 2, 3, 4}
    assert draw(logits, Sampling(top_k=2)) == {0, 1}
    assert draw(logits, Sampling(top_p=0.76)) == {0, 1, 2}
    assert draw(logits, Sampling(top_p=1e-9)) == {0}
    assert draw(logits, Sampling(min_p=0.2)) == {0, 1, 2}
    assert draw(logits, Sampling(top_k=3, top_p=0.8)) == {0, 1}
    assert draw(logits.flip(0), Sampling(top_p=0.76)) == {2, 3, 4}
    assert draw(logits, Sampling(temperature=0)) == {0}
    assert draw(
        logits, Sampling(repetition_penalty=9.0, top_k=1), torch.tensor([True, False, False, False, False])
    ) == {1}
    positive = logits + 10
    penalized = Sampling(repetition_penalty=2.0, temperature=0)
    assert draw(positive, penalized, torch.tensor([True, False, False, False, False])) == {1}


def test_the_temperature_is_in_the_frequencies() -> None:
    logits, generators = (
        torch.tensor([[2.0, 0.0]]).expand(4000, -1),
        [torch.Generator().manual_seed(s) for s in range(4000)],
    )
    drawn = next_tokens(logits, torch.zeros(4000, 2, dtype=torch.bool), Sampling(temperature=2.0), generators)
    assert float(1 - drawn.double().mean()) == pytest.approx(1 / (1 + 2.718281828**-1), abs=0.025)


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": 2.0}, {"repetition_penalty": 0.0}],
)
def test_numbers_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))} .* must be"):
        Sampling(**values)


def test_sampling_is_seeded_and_never_beyond_the_tokenizer(trained: dict[str, Run]) -> None:
    lm = load_checkpoint(trained["tssa"].dir).lm

    def text(seed: int, vocab_size: int = 512, sampling: Sampling = Sampling()) -> list[int]:  # noqa: B008
        writer = Writer(lm, vocab_size, sampling, [seed])
        writer.read(torch.tensor([[1]]))
        return write(writer, 60)

    assert text(1) == text(1) != text(2)
    assert text(1, sampling=Sampling(top_k=1)) == text(2, sampling=GREEDY)
    assert set(text(1, 7, Sampling(temperature=5.0))) <= set(range(7))


TEXTS = ["plain words, and more of them", " a  b \n\n\tc", "caf\u00e9 \u6f22\u5b57 \U0001f642 end", "\u2581x"]


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    before = tokenizer.encode("Fellow citizens")
    ids = tokenizer.encode(f"Fellow citizens{text}")
    if ids[: len(before)] != before:  # pieces across the edge
        before, text = [], f"Fellow citizens{text}"
    stream = TextStream(tokenizer, [tokenizer.eos_id, *before])
    pieces = [stream.add(token) for token in ids[len(before) :]]
    assert "".join(pieces) + stream.flush() == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_ends_the_text_wherever_tokens_divide_it(tokenizer: Tokenizer) -> None:
    text = "the first part. END and what follows"
    for stop, expected in ((["END"], "the first part. "), (["no such", "t p"], "the firs"), (["follows!"], text)):
        stream, found = TextStream(tokenizer, [tokenizer.eos_id], stop), ""
        for token in tokenizer.encode(text):
            found += stream.add(token)
            if stream.ended:
                break
        assert (found if stream.ended else found + stream.flush()) == expected
    stream = TextStream(tokenizer, [tokenizer.eos_id], ["END"])
    assert stream.add(tokenizer.eos_id) == "" and stream.ended


def test_the_subcommand(trained: dict[str, Run]) -> None:
    run = str(trained["softmax"].dir)
    result = tostlm("generate", run, "--prompt", "Fellow citizens", "--tokens", "8")
    assert succeed(result).startswith("Fellow citizens")
    assert re.fullmatch(r"read \d+ tokens in [\d.]+ s, wrote [1-8] at [\d,]+ tokens/s\n", result.stderr)
    fail(tostlm("generate", run, "--tokens", "80"), "longer than the model's 64 positions", "at most 64 --tokens")
    tost = str(trained["tssa"].dir)
    assert succeed(tostlm("generate", tost, "--tokens", "80")).strip()


def test_a_text_read_once_is_asked_many_times(trained: dict[str, Run], tmp_path: Path) -> None:
    tost, book, state = str(trained["tssa"].dir), tmp_path / "book.txt", tmp_path / "book.state"
    book.write_text("Fellow citizens of the Senate. " * 40)
    succeed(tostlm("generate", tost, "--prompt-file", str(book), "--tokens", "0", "--save-state", str(state)))
    options = ("--temperature", "0", "--tokens", "12")
    asked = [succeed(tostlm("generate", tost, "--state", str(state), "--prompt", " And", *options)) for _ in range(2)]
    whole = succeed(tostlm("generate", tost, "--prompt", book.read_text() + " And", *options))
    assert asked[0] == asked[1]
    assert whole == book.read_text() + asked[0]
    fail(tostlm("generate", str(trained["softmax"].dir), "--state", str(state)), "is of another model")


@torch.no_grad()
def test_a_chat_is_one_context(trained: dict[str, Run], tmp_path: Path) -> None:
    """Prompts from a terminal: each answer is what a plain loop writes after all that was said."""
    checkpoint, prompts = load_checkpoint(trained["tssa"].dir), ["Fellow citizens\n", "And so\n", "It\n"]
    context, expected = list[int](), ""
    for prompt in prompts:
        context += checkpoint.tokenizer.encode(prompt) if context else prompt_tokens(checkpoint.tokenizer, prompt)
        before = len(context)
        for _ in range(6):
            logits, _ = checkpoint.lm(torch.tensor([context]))
            context.append(int(logits[0, -1, : checkpoint.tokenizer.vocab_size].argmax()))
            if context[-1] == checkpoint.tokenizer.eos_id:
                break
        earlier, whole = (checkpoint.tokenizer.decode(context[:n]) for n in (before, len(context)))
        assert whole.startswith(earlier)
        expected += whole[len(earlier) :] + "\n"
    terminal, own = pty.openpty()
    command = ["generate", str(trained["tssa"].dir), "--chat", "--tokens", "6", "--temperature", "0"]
    program = subprocess.Popen(
        [sys.executable, "-m", "tostlm", *command], stdin=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    os.close(own)
    os.write(terminal, "".join(prompts).encode() + b"\x04")  # and the end of input
    printed, said = program.communicate(timeout=120)
    os.close(terminal)
    assert program.returncode == 0
    assert printed == expected
    assert said.count("> ") == 4 and said.count("tokens/s") == 3


def test_prompts_of_a_file(trained: dict[str, Run], tmp_path: Path) -> None:
    tost, file = str(trained["tssa"].dir), tmp_path / "prompts"
    prompts = ["Fellow citizens", 'a "quoted" one', "Fellow citizens", ""]
    file.write_text("".join(json.dumps({"prompt": p}) + "\n" if '"' in p else p + "\n" for p in prompts))
    options = ("--tokens", "6", "--seed", "5", "--stop", "zzz")
    lines = [
        json.loads(line) for line in succeed(tostlm("generate", tost, "--prompts", str(file), *options)).splitlines()
    ]
    assert [line["prompt"] for line in lines] == prompts
    for number, line in enumerate(lines):
        alone = succeed(
            tostlm("generate", tost, "--prompt", line["prompt"], "--tokens", "6", "--seed", str(5 + number))
        )
        assert alone == line["prompt"] + line["text"] + "\n"


def test_prompts_keep_what_is_no_end_of_line(trained: dict[str, Run], tmp_path: Path) -> None:
    tost, file = str(trained["tssa"].dir), tmp_path / "prompts"
    prompts = ["a\u2028b", "c\x0cd", "e\u0085f", "\ufeffg"]
    file.write_bytes(("\ufeff" + json.dumps({"prompt": prompts[0]}, ensure_ascii=False) + "\r\n").encode())
    with file.open("ab") as more:
        more.write(("\n".join(prompts[1:]) + "\n").encode())
    lines = succeed(tostlm("generate", tost, "--prompts", str(file), "--tokens", "2")).split("\n")
    assert [json.loads(line)["prompt"] for line in lines[:-1]] == prompts


def test_a_model_that_diverged_writes_nothing(checkpoint: Checkpoint) -> None:
    broken = copy.deepcopy(checkpoint)
    with torch.no_grad():
        broken.lm.norm.weight.fill_(torch.nan)
    for sampling in (GREEDY, Sampling()):
        writer = writer_of(broken, sampling)
        writer.read(torch.tensor([[1, 2]]))
        with pytest.raises(UserError, match="the model's logits are not finite; it has diverged, or needs a wider"):
            writer.write()


def test_terminals_of_other_encodings_show_what_they_can(trained: dict[str, Run]) -> None:
    command = [sys.executable, "-m", "tostlm", "generate", str(trained["tssa"].dir), "--tokens", "1", "--prompt", "é"]
    found = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("?")


def test_mistakes(trained: dict[str, Run], tmp_path: Path) -> None:
    tost, file = str(trained["tssa"].dir), tmp_path / "file"
    fail(tostlm("generate", tost, "--prompt", "a", "--chat"), "--prompt and --chat are different ways to prompt")
    fail(tostlm("generate", tost, "--top-p", "2"), "--top-p 2.0 must be above 0 and at most 1")
    fail(tostlm("generate", tost, "--prompt-file", str(file)), f"{file} cannot be read")
    file.write_bytes(b"abc\xff")
    fail(tostlm("generate", tost, "--prompt-file", str(file)), f"{file} is not UTF-8: byte 3 is none")
    file.write_text('fine\n{"text": "x"}\n')
    fail(tostlm("generate", tost, "--prompts", str(file)), f"{file}, line 2", 'is no {"prompt": "text"}')
    file.write_text("")
    fail(tostlm("generate", tost, "--prompts", str(file)), "has no prompts")
    fail(tostlm("generate", tost, "--prompts", str(file), "--state", str(file)), "a state is of one text")
    file.write_text("[" * 200_000 + "\n{" + '"a":[' * 200_000)
    fail(tostlm("generate", tost, "--prompts", str(file)), f"{file}, line 2", 'is no {"prompt": "text"}')
    broken = tostlm("generate", tost, "--tokens", "2", TOSTLM_TSSA_BACKEND="foo")
    fail(broken, "TOSTLM_TSSA_BACKEND=foo: TSSA backend 'foo' is not available here; use triton, cpp")
    saved = ("--tokens", "0", "--save-state")
    fail(tostlm("generate", tost, "--prompt", "a", *saved, str(tmp_path)), f"{tmp_path} is a folder; name a file in it")
    succeed(tostlm("generate", tost, "--prompt", "a", *saved, str(tmp_path / "state")))
    restored = ("--state", str(tmp_path / "state"), "--dtype", "bf16")
    fail(tostlm("generate", tost, *restored), "is of weights in float32; choose that --dtype again")
    fail(tostlm("generate", tost, "--state", str(tmp_path / "none")), "holds no state that this model could continue")
