"""Reading torch's pickles of other programs, of which nothing is executed."""

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
