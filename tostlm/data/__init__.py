"""Text to tokens to batches."""

from tostlm.data.loader import Loader
from tostlm.data.prepare import prepare
from tostlm.data.shards import HELDOUT, TRAIN, TokenSet, load_tokenizer, read_manifest, verify
from tostlm.data.sources import documents
from tostlm.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "HELDOUT",
    "TRAIN",
    "Loader",
    "TokenSet",
    "Tokenizer",
    "documents",
    "load_tokenizer",
    "prepare",
    "read_manifest",
    "train_tokenizer",
    "verify",
]
