"""What a prepared folder holds: counts, lengths of documents, samples of the text."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tostlm.data.loading.token_set import TokenSet
from tostlm.data.shards import Manifest, Split, load_tokenizer, read_manifest
from tostlm.errors import UserError
from tostlm.files import require_file_writable, write_atomically

DOCUMENTS = 1 << 20  # document ends read at once, which bounds the memory
CHARACTERS = 300  # of a sample
BAR = 40  # characters of the longest bar


class Lengths(NamedTuple):
    """How many documents have which length: int64 [distinct lengths] both, ascending; ends are counted in.

    T tokens hold fewer than sqrt(2 T) different lengths, a few megabytes for a trillion, so the table is exact.
    """

    tokens: np.ndarray
    documents: np.ndarray

    def percentile(self, percent: int) -> int:
        """The smallest length that at least `percent` percent of the documents do not exceed."""
        below = np.cumsum(self.documents)
        return int(self.tokens[np.searchsorted(100 * below, percent * below[-1])])

    def by_powers_of_two(self) -> dict[int, int]:
        """Documents of 2^k to 2^(k+1) - 1 tokens by k, from the shortest's k to the longest's."""
        powers = np.frexp(self.tokens)[1] - 1
        counts = np.bincount(powers, self.documents).astype(np.int64)
        return dict(enumerate(counts[powers[0] :].tolist(), int(powers[0])))


def show(folder: Path, samples: int, seed: int, plot: Path) -> Iterator[str]:
    """Paragraphs about prepared data: its making, each split's counts, lengths and samples; last, `plot` is written.

    Raises:
        UserError: the folder is not prepared or is damaged, `plot` cannot be written, matplotlib is missing.
    """
    manifest = read_manifest(folder)
    require_file_writable(plot)
    yield _heading(folder, manifest)
    lengths = {}
    for name, split in manifest.splits.items():
        if not split.documents:
            yield f"{name}: no documents"
            continue
        lengths[name] = document_lengths(folder, split)
        yield f"{name}: {_counts(split, lengths[name])}\n{_histogram(lengths[name])}"
        yield from sample_documents(folder, name, samples, seed)
    write_atomically(plot, _plot(lengths))
    yield f"lengths of documents drawn in {plot}"


def document_lengths(folder: Path, split: Split) -> Lengths:
    """The lengths of a split's documents in tokens, read shard by shard.

    Raises:
        UserError: a shard's document ends are missing or damaged.
    """
    tokens, documents = np.empty(0, np.int64), np.empty(0, np.int64)
    for shard in split.shards:
        previous = 0
        for start in range(0, shard.documents, DOCUMENTS):
            ends = _ends(folder, shard.name, shard.documents)[start : start + DOCUMENTS].astype(np.int64)
            lengths = np.diff(ends, prepend=previous)
            previous = int(ends[-1])
            found, counts = np.unique(lengths, return_counts=True)
            tokens, inverse = np.unique(np.concatenate([tokens, found]), return_inverse=True)
            documents = np.bincount(inverse, np.concatenate([documents, counts])).astype(np.int64)
        if previous != shard.tokens or (tokens < 1).any():
            raise UserError(
                f"shard {folder / shard.name}.ends is damaged: its document ends do not ascend to {shard.tokens}; "
                f"see `tostlm data verify {folder}`"
            )
    return Lengths(tokens, documents)


def sample_documents(folder: Path, split: str, samples: int, seed: int) -> Iterator[str]:
    """The beginnings of documents chosen by the seed, each under its number in the split.

    Raises:
        UserError: a shard is missing or damaged.
    """
    tokens, tokenizer = TokenSet(folder, split), load_tokenizer(folder)
    total = tokens.split.documents
    chosen = np.random.default_rng(seed).choice(total, min(samples, total), replace=False, shuffle=False)
    for number in sorted(chosen.tolist()):
        start, stop = _bounds(tokens, number)
        # A character has at most four tokens, one a byte.
        text = tokenizer.decode(tokens.read(start, min(stop - 1, start + 4 * CHARACTERS)).tolist())
        yield f"{split} document {number:,}, {stop - start:,} tokens:\n{_indented(text[:CHARACTERS])}"


def _bounds(tokens: TokenSet, number: int) -> tuple[int, int]:
    """First and past-the-last token of a document of the split, its end included."""
    base = 0
    for shard in tokens.split.shards:
        if number < shard.documents:
            ends = _ends(tokens.folder, shard.name, shard.documents)
            return base + (int(ends[number - 1]) if number else 0), base + int(ends[number])
        number -= shard.documents
        base += shard.tokens
    raise IndexError(number)


def _ends(folder: Path, shard: str, documents: int) -> np.ndarray:
    path = folder / f"{shard}.ends"
    if not path.is_file() or path.stat().st_size != 8 * documents:
        raise UserError(f"shard {path} is missing or of another size than its manifest says; prepare the data again")
    return np.memmap(path, "<u8", "r")


def _indented(text: str) -> str:
    """Text that cannot steer the terminal it is printed on."""
    safe = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return textwrap.indent("".join(safe), "    ")


def _heading(folder: Path, manifest: Manifest) -> str:
    return "\n".join(
        [
            f"{folder}: token ids {manifest.dtype} of a vocabulary of {manifest.vocab_size:,}",
            f"tokenizer sha256 {manifest.tokenizer_sha256}",
            *(f"source {source}" for source in manifest.sources),
        ]
    )


def _counts(split: Split, lengths: Lengths) -> str:
    facts = {
        "mean": f"{split.tokens / split.documents:,.1f}",
        "median": f"{lengths.percentile(50):,}",
        "p90": f"{lengths.percentile(90):,}",
        "p99": f"{lengths.percentile(99):,}",
        "longest": f"{lengths.tokens[-1]:,}",
    }
    return (
        f"{split.tokens:,} tokens of {split.documents:,} documents; shards: {len(split.shards):,}; "
        f"text: {split.text_bytes:,} bytes, {split.text_bytes / split.tokens:.3f} a token\n"
        f"tokens a document, its end included: {', '.join(f'{name} {value}' for name, value in facts.items())}"
    )


def _histogram(lengths: Lengths) -> str:
    counts = lengths.by_powers_of_two()
    most, total = max(counts.values()), sum(counts.values())
    return "\n".join(
        f"{1 << k:>11,} - {(2 << k) - 1:>11,} {count:>13,} {count / total:>6.1%} |{'#' * round(BAR * count / most)}"
        for k, count in counts.items()
    )


def _plot(splits: Mapping[str, Lengths]) -> bytes:
    """The share of each split's documents in each power of two, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("drawing takes matplotlib, which is not installed; `pip install 'tostlm[eval]'`") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, lengths in splits.items():
        counts = lengths.by_powers_of_two()
        edges = [2.0**k for k in [*counts, max(counts) + 1]]
        total = sum(counts.values())
        axes.stairs(
            [count / total for count in counts.values()], edges, fill=True, alpha=0.4, label=f"{name}, {total:,}"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of a document, its end included")
    axes.set_ylabel("share of the split's documents")
    axes.set_title("Lengths of documents")
    axes.grid(alpha=0.3)
    if splits:
        axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=150)
    pyplot.close(figure)
    return image.getvalue()
