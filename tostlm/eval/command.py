"""What `tostlm eval` and `tostlm generate` do."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from tostlm.checkpoint import load_checkpoint, run_folder
from tostlm.data import VALIDATION, TokenSet
from tostlm.errors import UserError
from tostlm.eval.generate import generate
from tostlm.eval.perplexity import choose_targets, score_contexts
from tostlm.eval.report import ModelScores, table, write_report
from tostlm.files import distinct_names, require_writable
from tostlm.model import best_device


def perplexity(
    paths: Sequence[Path], contexts: Sequence[int], data: Path | None, windows: int, out: Path | None
) -> str:
    """Score checkpoints on the same targets, write the report, return the table.

    Raises:
        UserError: a checkpoint, the data or the contexts do not go together.
    """
    checkpoints = [load_checkpoint(path, best_device()) for path in paths]
    tokens = TokenSet(data or checkpoints[0].config.data.sets[0][0], VALIDATION)
    folders = [run_folder(checkpoint.path) for checkpoint in checkpoints]
    out = out or folders[0]
    require_writable(out)
    targets = choose_targets(tokens, contexts, windows)
    names = distinct_names(folders)
    models = []
    for name, checkpoint in zip(names, checkpoints, strict=True):
        positions = checkpoint.config.model.positions
        if positions is not None and positions < min(contexts):
            raise UserError(
                f"{checkpoint.path} has {positions} positions, fewer than the shortest of --contexts, {min(contexts)}"
            )
        scores = list(score_contexts(checkpoint, tokens, targets, contexts))
        models.append(ModelScores(name, str(checkpoint.path), checkpoint.progress.step, positions, scores))
    facts = {"data": str(tokens.folder), "targets": len(targets.ends) * targets.span}
    write_report(models, facts, out)
    return f"{table(models, contexts)}\nwritten to {out}/perplexity.json, .csv and .png"


def write_text(path: Path, prompt: str, tokens: int, temperature: float, top_k: int | None, seed: int) -> str:
    """The prompt and what the model writes after it, to the document's end or `tokens` tokens.

    Raises:
        UserError: there is no checkpoint, or the prompt and the text are longer than the model's positions.
    """
    checkpoint = load_checkpoint(path, best_device())
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not valid text in this terminal's encoding; use UTF-8") from None
    tokenizer, positions = checkpoint.tokenizer, checkpoint.config.model.positions
    start = [tokenizer.eos_id, *tokenizer.encode(prompt)]  # a document begins after the end of another
    if positions is not None and len(start) + tokens - 1 > positions:
        room = positions - len(start) + 1
        way_out = f"ask for at most {room} --tokens" if room > 0 else "shorten the prompt"
        raise UserError(
            f"a prompt of {len(start)} tokens and {tokens} more are longer than the model's {positions} positions; "
            f"{way_out}"
        )
    written = generate(checkpoint.lm, start, tokenizer.vocab_size, temperature=temperature, top_k=top_k, seed=seed)
    text = itertools.takewhile(lambda token: token != tokenizer.eos_id, itertools.islice(written, tokens))
    return tokenizer.decode([*start, *text])  # as one, for tokenizers that write a document's first space
