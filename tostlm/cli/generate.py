"""The subcommand generate: text from a checkpoint, streamed, in batches, in a loop of prompts, from a stored state."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tostlm.cli.app import CheckpointPath, app
from tostlm.errors import UserError
from tostlm.files import read_json_object

if TYPE_CHECKING:
    from tostlm.checkpoint import Checkpoint
    from tostlm.eval.sampling import Sampling


@app.command()
def generate(
    checkpoint: CheckpointPath,
    prompt: Annotated[str | None, typer.Option(help="text to continue; default: the start of a document")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="a file whose text, in UTF-8, is the prompt")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='a file of prompts, one a line, or {"prompt": ...} a line; writes JSON lines')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="read prompts from the terminal, a line each")] = False,
    tokens: Annotated[int, typer.Option(min=0, help="tokens to generate at most")] = 100,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="sample among this many of the likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="sample among the likeliest tokens of this probability")] = None,
    min_p: Annotated[
        float | None, typer.Option(help="sample among tokens of this part of the likeliest one's probability")
    ] = None,
    repetition_penalty: Annotated[
        float, typer.Option(help="above 1 makes tokens of the text so far less likely")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="of the n-th prompt of a file: plus n")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="a string that ends the text, once or more")] = None,
    state: Annotated[Path | None, typer.Option(help="continue from what --save-state stored")] = None,
    save_state: Annotated[Path | None, typer.Option(help="store what was read and written in a file")] = None,
    batch: Annotated[int, typer.Option(min=1, help="prompts of one length that are continued at a time")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: the GPU if there is one")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights: fp32, bf16 or fp16; default: as saved")] = None,
) -> None:
    """Generate text with a checkpoint, up to the end of the document; how fast is said on stderr.

    A state holds a whole context in a file: a book is read once with --prompt-file and --save-state, and asked many
    times with --state and --prompt.
    """
    from tostlm.checkpoint import load_checkpoint
    from tostlm.device import best_device, parse_device, parse_dtype
    from tostlm.eval.sampling import Sampling

    asked = {"--prompt": prompt, "--prompt-file": prompt_file, "--prompts": prompts, "--chat": chat or None}
    given = [name for name, value in asked.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are different ways to prompt; choose one")
    if prompts is not None and (state or save_state):
        raise UserError("a state is of one text; leave --prompts or the state out")
    try:
        sampling = Sampling(repetition_penalty, temperature, top_k, top_p, min_p)
    except ValueError as error:
        raise UserError(f"--{str(error).replace('_', '-', 1)}") from None
    loaded = load_checkpoint(checkpoint, best_device() if device is None else parse_device(device))
    if dtype is not None:
        loaded.lm.to(parse_dtype(dtype))
    if prompts is not None:
        _write_lines(loaded, _read_prompts(prompts), tokens, sampling, seed, stop or [], batch)
        return
    text = prompt if prompt_file is None else _read_text(prompt_file)
    turns = _lines_of_terminal() if chat else iter([text or ""])
    _write_turns(loaded, turns, tokens, sampling, seed, stop or [], state, save_state, echo=prompt or "")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: byte {error.start} is none; convert it first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file: one a line, or the "prompt" of a JSON object a line."""
    found = []
    lines = _read_text(path).removeprefix("\ufeff").replace("\r\n", "\n").split("\n")  # a prompt may have other breaks
    for number, line in enumerate(lines[:-1] if not lines[-1] else lines, 1):
        if not line.startswith("{"):
            found.append(line)
            continue
        value = (read_json_object(line) or {}).get("prompt")
        if not isinstance(value, str):
            raise UserError(f'{path}, line {number}: {line[:60]!r} is no {{"prompt": "text"}}')
        found.append(value)
    if not found:
        raise UserError(f"{path} has no prompts; write one a line")
    return found


def _lines_of_terminal() -> Iterator[str]:
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line


def _write_turns(
    loaded: Checkpoint,
    turns: Iterator[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    stop: list[str],
    state: Path | None,
    save_state: Path | None,
    echo: str,
) -> None:
    """Read texts one after the other, and print what follows each as it is written."""
    import torch

    from tostlm.eval.generate import prompt_tokens, require_room, write_text
    from tostlm.eval.writer import Writer
    from tostlm.files import require_file_writable

    if save_state is not None:
        require_file_writable(save_state.absolute())
    model, tokenizer = loaded.content, loaded.tokenizer
    writer = Writer(loaded.lm, tokenizer.vocab_size, sampling, [seed])
    if state is not None:
        writer.restore(state, model)
    for text in turns:
        ids = prompt_tokens(tokenizer, text)[writer.tokens > 0 :]  # of a document that has begun, without its start
        require_room(loaded.config.model.positions, writer.tokens + len(ids), tokens)
        start = time.perf_counter()
        writer.read(torch.tensor([ids], dtype=torch.int64))
        begun, before = time.perf_counter(), writer.tokens
        print(echo, end="", flush=True)
        for piece in write_text(writer, tokenizer, ids or writer.pending[0].tolist(), tokens, stop):
            print(piece, end="", flush=True)
        print()
        written = writer.tokens - before
        rate = written / (time.perf_counter() - begun)
        about = f"read {len(ids):,} tokens in {begun - start:.2f} s, wrote {written:,} at {rate:,.0f} tokens/s"
        print(about, file=sys.stderr)
        if save_state is not None:
            writer.save(save_state, model)


def _write_lines(
    loaded: Checkpoint, prompts: list[str], tokens: int, sampling: Sampling, seed: int, stop: list[str], batch: int
) -> None:
    """Print a JSON line for each prompt, in their order; those of one length are continued together."""
    from tostlm.eval.generate import prompt_tokens, require_room, write_batch

    ids = [prompt_tokens(loaded.tokenizer, prompt) for prompt in prompts]
    require_room(loaded.config.model.positions, max(map(len, ids)), tokens)
    texts: dict[int, str] = {}
    by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    printed = 0
    while by_length:
        length = len(ids[by_length[0]])
        together = [index for index in by_length[:batch] if len(ids[index]) == length]
        by_length = by_length[len(together) :]
        seeds = [seed + index for index in together]
        found = write_batch(loaded.lm, loaded.tokenizer, [ids[i] for i in together], tokens, sampling, seeds, stop)
        texts |= dict(zip(together, found, strict=True))
        while printed in texts:
            print(json.dumps({"prompt": prompts[printed], "text": texts[printed]}, ensure_ascii=False), flush=True)
            printed += 1
