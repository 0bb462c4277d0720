"""A model for runtimes without this project's code: programs of torch.export, and ONNX.

A folder has the program that reads one token, what it starts from, and decoder.json, which names its tensors.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from tostlm.checkpoint import Checkpoint
from tostlm.convert.decoder import Decoder
from tostlm.convert.tokenizer import save_tokenizer
from tostlm.convert.verify import Comparison, compare
from tostlm.errors import UserError
from tostlm.model.lm import LM, LMState

STEP, PREFILL, ONNX = "step.pt2", "prefill.pt2", "step.onnx"
START, ABOUT = "start.safetensors", "decoder.json"
EXAMPLE_TOKENS = 5  # of the state that a program is traced with
LONGEST = 1 << 30  # tokens that a growing state may hold
ONNX_BYTES = 2**31 - 1  # that a file may have
CHECKED_STEPS = 100

Read = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]  # as `Decoder.forward`


@torch.no_grad()
def write_torch_export(checkpoint: Checkpoint, folder: Path, *, prefill_tokens: int = 64) -> list[Comparison]:
    """Write programs that `torch.export.load` reads: one for a token, one for `prefill_tokens` at a time.

    Raises:
        UserError: they do not compute the same.
    """
    lm = copy.deepcopy(checkpoint.lm).float()
    if lm.config.positions is not None:
        prefill_tokens = min(prefill_tokens, lm.config.positions - 1)
    decoder, start = _write_start(checkpoint, lm, folder, prefill_tokens)
    found = []
    for name, tokens in ((STEP, 1), (PREFILL, prefill_tokens)):
        content = io.BytesIO()  # torch's own writing to a full disk ends the process
        torch.export.save(_trace(decoder, tokens), content)
        (folder / name).write_bytes(content.getbuffer())
        program = torch.export.load(folder / name).module()
        found += _compare(program, checkpoint, decoder, start, tokens, folder)
    return found


@torch.no_grad()
def write_onnx(checkpoint: Checkpoint, folder: Path) -> list[Comparison]:
    """Write an ONNX model that reads a token: inputs tokens, positions and in.NAME, outputs logits and out.NAME.

    Raises:
        UserError: onnx or onnxruntime is missing, the model is too large for a file, or does not compute the same.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter takes it)
    except ImportError:
        raise UserError("--to onnx takes `pip install 'tostlm[onnx]'`") from None
    lm = copy.deepcopy(checkpoint.lm).float()
    if (size := sum(parameter.nbytes for parameter in lm.parameters())) > ONNX_BYTES:
        raise UserError(f"{checkpoint.path} has {size:,} bytes of weights, and an ONNX file holds {ONNX_BYTES:,}")
    decoder, start = _write_start(checkpoint, lm, folder, None)
    inputs = ["tokens", "positions", *(f"in.{name}" for name in decoder.names)]
    outputs = ["logits", *(f"out.{name}" for name in decoder.names)]
    with _quiet():
        program = torch.onnx.export(
            _trace(decoder, 1), dynamo=True, input_names=inputs, output_names=outputs, verbose=False
        )
    assert program is not None
    program.save(str(folder / ONNX), external_data=False)
    session = onnxruntime.InferenceSession(str(folder / ONNX), providers=["CPUExecutionProvider"])

    def read(tokens: Tensor, positions: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        given = zip(inputs, [tokens, positions, *state], strict=True)
        logits, *after = session.run(None, {name: tensor.numpy() for name, tensor in given})
        return torch.from_numpy(logits), [torch.from_numpy(tensor) for tensor in after]

    return _compare(read, checkpoint, decoder, start, 1, folder)


def _write_start(checkpoint: Checkpoint, lm: LM, folder: Path, prefill_tokens: int | None) -> tuple[Decoder, LMState]:
    """Write all but the programs, and return what they are made of and the state that they start from."""
    eos_id, config = checkpoint.tokenizer.eos_id, lm.config
    if config.positions == 1:
        raise UserError(f"{checkpoint.path} has one position: after the start of a text it can read no token")
    logits, state = lm(torch.tensor([[eos_id]]))
    decoder = Decoder(lm, state)
    tensors = dict(zip(decoder.names, decoder.flatten(state), strict=True))
    stored = {"logits": logits[:, -1], **tensors}
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in stored.items()})
    (folder / START).write_bytes(content)
    about = {
        "vocab_size": config.vocab_size,
        "positions": config.positions,  # the longest context; null is unbounded
        "eos_id": eos_id,  # which begins every text, and has been read in the state to start from
        "prefill_tokens": prefill_tokens,
        "state": [
            {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            for name, tensor in tensors.items()
        ],
    }
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    save_tokenizer(checkpoint.tokenizer, config.positions, folder)
    return decoder, state


def _trace(decoder: Decoder, tokens: int) -> torch.export.ExportedProgram:
    """Return a program that reads so many tokens after any others."""
    lm = decoder.lm
    probe = torch.zeros(1, min(EXAMPLE_TOKENS, (lm.config.positions or LONGEST) - 1), dtype=torch.int64)
    _, state = lm(probe)
    given = decoder.flatten(state)
    past = torch.export.Dim("past", min=1, max=LONGEST)
    longer = decoder.flatten(lm(probe[:, :1], state)[1])
    shapes = [
        {dim: past for dim, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if a != b}
        for before, after in zip(given, longer, strict=True)
    ]
    inputs = (torch.zeros(1, tokens, dtype=torch.int64), torch.arange(probe.shape[1], probe.shape[1] + tokens), given)
    return torch.export.export(decoder, inputs, dynamic_shapes=({}, {}, shapes), strict=False)


def _compare(
    read: Read, checkpoint: Checkpoint, decoder: Decoder, start: LMState, tokens: int, folder: Path
) -> list[Comparison]:
    """Compare what a program computes after the start, reading so many tokens at a time."""
    lm, stored = decoder.lm, safetensors.torch.load_file(folder / START)
    state, expected_state = [stored[name] for name in decoder.names], start
    limit = (lm.config.positions or LONGEST) - 1
    steps = min(CHECKED_STEPS if tokens == 1 else 3, limit // tokens)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(checkpoint.tokenizer.vocab_size, (1, steps * tokens), generator=generator)
    found, expected = [], []
    for place, piece in enumerate(torch.split(text, tokens, dim=1)):
        first = 1 + place * tokens
        logits, state = read(piece, torch.arange(first, first + tokens), state)
        own, expected_state = lm(piece, expected_state)
        found.append(logits)
        expected.append(own[:, -1])
    what = f"logits of {steps} steps" if tokens == 1 else f"logits of {steps} x {tokens} tokens"
    return [compare(what, torch.cat(found), torch.cat(expected))]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's ONNX exporter from telling what it does, and which libraries it would know too."""
    level: Any = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
