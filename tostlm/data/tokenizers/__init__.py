"""Tokenizers: text to token ids and back, from SentencePiece models or Hugging Face's tokenizer.json."""

from tostlm.data.tokenizers.base import METASPACE, Tokenizer
from tostlm.data.tokenizers.fast import BYTE_CHARACTERS, FastTokenizer, parse_tokenizer_json
from tostlm.data.tokenizers.importing import import_tokenizer
from tostlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from tostlm.data.tokenizers.training import limit_bytes, train_tokenizer

__all__ = [
    "BYTE_CHARACTERS",
    "METASPACE",
    "FastTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "import_tokenizer",
    "limit_bytes",
    "parse_tokenizer_json",
    "train_tokenizer",
]
