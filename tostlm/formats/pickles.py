"""Torch's pickles, as other programs have them: read without executing anything, and written."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tostlm.errors import UserError, error_summary


def load_pickle(path: Path, holding: str, advice: str, if_unreadable: str, records: Sequence[type] = ()) -> Any:
    """Return what torch has saved to a file. Tensors stay in it until they are used, but for files of old formats.

    Args:
        holding: what may be in it, for the user: "tensors and plain values".
        advice: a sentence for one who has saved more; "" is none.
        if_unreadable: what to make of a file that cannot be read.
        records: classes that may be in it besides.

    Raises:
        UserError: it holds anything else, or is damaged.
    """
    try:
        with torch.serialization.safe_globals(list(records)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's about a pickle's protocol, before it refuses what is in it
            return torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError:
        refused = f"{path} holds more than {holding}, or is damaged; nothing in it was executed"
        raise UserError(f"{refused}. {advice}" if advice else refused) from None
    except Exception as error:  # of damaged files torch's reader raises any
        raise UserError(f"{path} cannot be read: {error_summary(error)}; {if_unreadable}") from None


def save_pickle(value: object, path: Path) -> None:
    """Save as torch does.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # which torch's writer makes of what a full disk raises
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
