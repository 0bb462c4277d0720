"""Text to tokens to batches."""

from tostlm.data.loading import BatchStage, Loader, NumpyBatch, Targets, TokenSet, choose_targets, evenly_spread
from tostlm.data.preparation.merge import merge
from tostlm.data.preparation.plan import PreparationSettings
from tostlm.data.preparation.prepare import parse_task, prepare
from tostlm.data.preparation.selection import Selection, documents, format_counts
from tostlm.data.preparation.token_import import import_tokens
from tostlm.data.shards import (
    MANIFEST,
    TRAIN,
    VALIDATION,
    Manifest,
    common_tokenizer,
    load_tokenizer,
    read_manifest,
)
from tostlm.data.show import show
from tostlm.data.tokenizers import Tokenizer, import_tokenizer, limit_bytes, train_tokenizer
from tostlm.data.verification import ShardStates, shard_files, verify, verify_once

__all__ = [
    "MANIFEST",
    "TRAIN",
    "VALIDATION",
    "BatchStage",
    "Loader",
    "Manifest",
    "NumpyBatch",
    "PreparationSettings",
    "Selection",
    "ShardStates",
    "Targets",
    "TokenSet",
    "Tokenizer",
    "choose_targets",
    "common_tokenizer",
    "documents",
    "evenly_spread",
    "format_counts",
    "import_tokenizer",
    "import_tokens",
    "limit_bytes",
    "load_tokenizer",
    "merge",
    "parse_task",
    "prepare",
    "read_manifest",
    "shard_files",
    "show",
    "train_tokenizer",
    "verify",
    "verify_once",
]
