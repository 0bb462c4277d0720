"""Models in the formats of other programs, read as tostlm's: nothing in their files is executed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError
from tostlm.files import sha256_of
from tostlm.formats.deepspeed import is_deepspeed, read_trained
from tostlm.formats.folders import TRAINING, folder_content, is_hugging_face, read_folder
from tostlm.formats.release import read_release, release_file
from tostlm.model import ModelConfig

__all__ = ["TRAINING", "ForeignModel", "content_of", "is_foreign", "is_hugging_face", "read_foreign"]


class ForeignModel(NamedTuple):
    """A model that another program, or an export, has written."""

    config: ModelConfig
    weights: dict[str, Tensor]  # by tostlm's names; read from their files when they are used
    tokenizer: Tokenizer
    training: Path | None  # the folder of what it was trained by, in an export of tostlm's


def is_foreign(path: Path) -> bool:
    """Return whether a path is a model in another format: of Hugging Face, DeepSpeed or the release."""
    return is_hugging_face(path) or is_deepspeed(path) or release_file(path) is not None


def read_foreign(path: Path, tokenizer: Path | None = None) -> ForeignModel:
    """Return the model at a path that `is_foreign`.

    Args:
        tokenizer: its tokenizer; by default the one that lies beside the weights.

    Raises:
        UserError: it is damaged, of a model that tostlm has not, or its tokenizer is unknown or has more tokens.
    """
    file = release_file(path)
    if file is not None:
        config, weights = read_release(file)
    else:
        config, weights = read_folder(path) if is_hugging_face(path) else read_trained(path)
    folder = path if file is None else file.parent
    training = folder / TRAINING if (folder / TRAINING).is_dir() else None
    try:
        if tokenizer is None and training is not None:
            found = Tokenizer.from_folder(training)
        else:
            found = import_tokenizer(tokenizer or folder)
    except UserError as error:
        advice = "" if tokenizer else "; put its tokenizer beside it, or name it with --tokenizer"
        raise UserError(f"{path} is a model without a usable tokenizer: {error}{advice}") from None
    if found.vocab_size > config.vocab_size:
        raise UserError(
            f"{path} has {config.vocab_size:,} tokens and its tokenizer {found.vocab_size:,}: that is not its own"
        )
    if len({weight.dtype for weight in weights.values()}) > 1:
        weights = {name: weight.float() for name, weight in weights.items()}
    return ForeignModel(config, weights, found, training)


def content_of(path: Path) -> str:
    """Return what changes with a foreign model: a file's hash, or the names, sizes and times of a folder's files."""
    return folder_content(path) if path.is_dir() else sha256_of(path)
