"""Text to tokens to batches."""

from tostlm.data.loader import Loader
from tostlm.data.prepare import prepare
from tostlm.data.shards import HELDOUT, MANIFEST, TRAIN, TokenSet, load_tokenizer, read_manifest, verify
from tostlm.data.sources import documents
from tostlm.data.tokenizer import Tokenizer
from tostlm.data.tokenizer_import import import_tokenizer
from tostlm.data.tokenizer_training import first_bytes, train_tokenizer

__all__ = [
    "HELDOUT",
    "MANIFEST",
    "TRAIN",
    "Loader",
    "TokenSet",
    "Tokenizer",
    "documents",
    "first_bytes",
    "import_tokenizer",
    "load_tokenizer",
    "prepare",
    "read_manifest",
    "train_tokenizer",
    "verify",
]
