"""Text to tokens to batches."""

from tostlm.data.loader import Batch, Loader, Stage, common_tokenizer
from tostlm.data.merge import merge, told
from tostlm.data.plan import Settings
from tostlm.data.prepare import Task, parse_task, prepare
from tostlm.data.selection import Selection, documents
from tostlm.data.shards import HELDOUT, MANIFEST, TRAIN, Manifest, load_tokenizer, read_manifest
from tostlm.data.show import show
from tostlm.data.token_import import import_tokens
from tostlm.data.token_set import TokenSet, shard_files, verify
from tostlm.data.tokenizer import Tokenizer
from tostlm.data.tokenizer_import import import_tokenizer
from tostlm.data.tokenizer_training import first_bytes, train_tokenizer

__all__ = [
    "HELDOUT",
    "MANIFEST",
    "TRAIN",
    "Batch",
    "Loader",
    "Manifest",
    "Selection",
    "Settings",
    "Stage",
    "Task",
    "TokenSet",
    "Tokenizer",
    "common_tokenizer",
    "documents",
    "first_bytes",
    "import_tokenizer",
    "import_tokens",
    "load_tokenizer",
    "merge",
    "parse_task",
    "prepare",
    "read_manifest",
    "shard_files",
    "show",
    "told",
    "train_tokenizer",
    "verify",
]
