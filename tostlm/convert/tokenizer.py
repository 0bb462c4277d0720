"""Writing a tokenizer as transformers reads it: a tokenizer.json, which needs no SentencePiece."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from tostlm.data.tokenizers import METASPACE, FastTokenizer, SentencePieceTokenizer, Tokenizer, parse_tokenizer_json


def save_tokenizer(tokenizer: Tokenizer, positions: int | None, folder: Path) -> None:
    """Write tokenizer.json and its configuration to a folder, for a model with a number of positions, if it has any.

    Ids are the same as the tokenizer's for every text that does not spell a special token: transformers reads such a
    text, as `<|endoftext|>`, as the special token itself. Before a text it puts the end-of-document token, as
    `tostlm generate` does, unless it is asked for none (`add_special_tokens=False`).
    """
    if isinstance(tokenizer, FastTokenizer):
        # Generation continues a text, so nothing may follow it.
        content = json.loads(tokenizer.content) | {"post_processor": None}
        fast = parse_tokenizer_json(json.dumps(content).encode())
    else:
        assert isinstance(tokenizer, SentencePieceTokenizer)
        fast = _from_sentencepiece(tokenizer)
    eos = tokenizer.eos_token
    fast.post_processor = processors.TemplateProcessing(
        single=f"{eos} $A", pair=f"{eos} $A {eos} $B", special_tokens=[(eos, tokenizer.eos_id)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=tokenizer.eos_token,
        bos_token=tokenizer.eos_token,  # what stands before every document
        pad_token=tokenizer.eos_token,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=positions or int(1e30),
    ).save_pretrained(folder)


def _from_sentencepiece(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """Return the same BPE with plain spaces in its pieces, so that U+2581 in a text is an ordinary character."""
    vocabulary = {piece.replace(METASPACE, " "): token for token, piece in enumerate(tokenizer.pieces)}
    fast = tokenizers.Tokenizer(models.BPE(vocabulary, _merges(vocabulary), byte_fallback=True))
    steps = [decoders.ByteFallback(), decoders.Fuse()]
    if tokenizer.adds_space:
        fast.normalizer = normalizers.Prepend(" ")
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    return fast


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Return every pair of pieces that joins to a piece, in the order in which BPE learned the pieces."""
    pairs = [(piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece))]
    known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
    return sorted(known, key=lambda pair: [vocabulary[part] for part in ("".join(pair), *pair)])
