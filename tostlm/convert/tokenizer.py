"""Our SentencePiece tokenizer as a `tokenizers` file, which transformers reads without SentencePiece."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from tostlm.data.tokenizer import SPACE, Tokenizer


def save_tokenizer(tokenizer: Tokenizer, positions: int | None, folder: Path) -> None:
    """Write tokenizer.json and its configuration: the same ids for every text without the document end's name.

    Pieces hold plain spaces there instead of SentencePiece's U+2581, so that the character itself is nothing special.
    Written out (`<|endoftext|>`), that is the document end there, as usual in transformers.
    """
    vocabulary = {piece.replace(SPACE, " "): token for token, piece in enumerate(tokenizer.pieces())}
    model = models.BPE(vocabulary, _merges(vocabulary), byte_fallback=True)
    fast = tokenizers.Tokenizer(model)
    fast.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    PreTrainedTokenizerFast(
        tokenizer_object=fast,
        eos_token=tokenizer.end_piece,
        bos_token=tokenizer.end_piece,  # what stands before every document
        pad_token=tokenizer.end_piece,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=positions or int(1e30),
    ).save_pretrained(folder)


def _merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of pieces that makes a piece, in the order BPE learned the pieces."""
    merges = []
    for piece, token in vocabulary.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in vocabulary and right in vocabulary]
        merges += [(token, vocabulary[left], vocabulary[right], left, right) for left, right in known]
    return [(left, right) for *_, left, right in sorted(merges)]
