"""Text to tokens to batches."""

from tostlm.data.loader import Loader
from tostlm.data.prepare import prepare
from tostlm.data.shards import HELDOUT, MANIFEST, TRAIN, TokenSet, load_tokenizer, read_manifest, verify
from tostlm.data.show import show
from tostlm.data.sources import documents
from tostlm.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "HELDOUT",
    "MANIFEST",
    "TRAIN",
    "Loader",
    "TokenSet",
    "Tokenizer",
    "documents",
    "load_tokenizer",
    "prepare",
    "read_manifest",
    "show",
    "train_tokenizer",
    "verify",
]
