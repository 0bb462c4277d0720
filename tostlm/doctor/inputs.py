"""What a run reads: prepared folders, and the checkpoint it would go on from."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tostlm.checkpoint import checkpoints, read_train_state
from tostlm.config import RunConfig
from tostlm.data import TRAIN, VALIDATION, Tokenizer, TokenSet, common_tokenizer, read_manifest, shard_files, verify
from tostlm.doctor.finding import FAIL, OK, Finding, amount, minority, unfit
from tostlm.errors import UserError

SAMPLE_BYTES = 1 << 28  # checksummed on each host, and one file of each folder at least


class Data(NamedTuple):
    """The prepared folders as one host sees them."""

    contents: str  # their identity
    checked_bytes: int
    total_bytes: int
    error: str


def measure(config: RunConfig, rank: int) -> Data:
    """Read every manifest and checksum a sample of the files, another on each host. For one rank of a host."""
    folders = config.data.folders
    try:
        common_tokenizer(folders, config.model.vocab_size)
        contents = " ".join(read_manifest(folder).content_sha256[:12] for folder in folders)
        checked, total = 0, 0
        for folder in folders:
            for split in (TRAIN, VALIDATION):
                TokenSet(folder, split)
            sizes = {name: (folder / name).stat().st_size for name in shard_files(read_manifest(folder))}
            chosen = _sample(sizes, SAMPLE_BYTES // len(folders), rank)
            checked += sum(sizes[name] for name in verify(folder, chosen))
            total += sum(sizes.values())
    except UserError as error:
        return Data("", 0, 0, str(error))
    except OSError as error:
        return Data("", 0, 0, f"{error.filename} cannot be read: {error.strerror}")
    return Data(contents, checked, total, "")


def _sample(sizes: dict[str, int], budget: int, seed: int) -> list[str]:
    """Files of `budget` bytes in all, one at least."""
    names = sorted(sizes)
    random.Random(seed).shuffle(names)
    chosen = names[:1]
    for name in names[1:]:
        if sum(sizes[one] for one in chosen) + sizes[name] <= budget:
            chosen.append(name)
    return chosen


def judge(found: Sequence[tuple[int, Data]], hosts: Sequence[str]) -> Finding:
    """Whether every host, with the rank that looked, reads the same whole data."""
    bad = [(rank, data) for rank, data in found if data.error]
    if len(bad) == len(found):
        return Finding("data", FAIL, bad[0][1].error)
    if bad:
        return unfit("data", [rank for rank, _ in bad], hosts, bad[0][1].error)
    odd, _ = minority([data.contents for _, data in found])
    if odd:
        return unfit("data", [found[place][0] for place in odd], hosts, "it holds other data", "copy the same there")
    checked, total = found[0][1].checked_bytes, found[0][1].total_bytes
    share = f"{amount(checked, 'B')} of" if checked < total else "all"
    return Finding(
        "data",
        OK,
        f"{share} {amount(total, 'B')} checksummed on {'each' if len(found) > 1 else 'the'} host, one tokenizer",
    )


def resumption(config: RunConfig) -> Finding:
    """Whether the newest checkpoint of the run's folder, as rank 0 sees it, is of these data's tokenizer."""
    found = checkpoints(config.run_dir)
    if not found:
        return Finding("resume", OK, f"no checkpoint in {config.run_dir}: the run starts at step 0")
    newest: Path = found[-1]
    try:
        step = read_train_state(newest).step
        theirs = Tokenizer.from_folder(newest).sha256
        ours = common_tokenizer(config.data.folders).sha256
    except UserError as error:
        return Finding("resume", FAIL, str(error))
    if theirs != ours:
        measured = f"checkpoint {newest} was trained with another tokenizer than the data has"
        return Finding("resume", FAIL, measured, "choose another run_dir, or the data it was trained on")
    return Finding("resume", OK, f"from step {step}, {newest}")
