"""Text to tokens to batches."""

from tostlm.data.loader import Batch, Loader, Stage, common_tokenizer
from tostlm.data.prepare import prepare
from tostlm.data.shards import HELDOUT, MANIFEST, TRAIN, TokenSet, load_tokenizer, read_manifest, verify
from tostlm.data.sources import documents
from tostlm.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "HELDOUT",
    "MANIFEST",
    "TRAIN",
    "Batch",
    "Loader",
    "Stage",
    "TokenSet",
    "Tokenizer",
    "common_tokenizer",
    "documents",
    "load_tokenizer",
    "prepare",
    "read_manifest",
    "train_tokenizer",
    "verify",
]
