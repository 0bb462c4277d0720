"""Description of a prepared folder: counts, lengths of documents, samples of the text."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tostlm.data.loading.token_set import TokenSet
from tostlm.data.shards import Split, load_tokenizer, read_manifest
from tostlm.files import require_file_writable, write_atomically
from tostlm.plots import new_figure, png_bytes

CHARACTERS = 300  # of a sample
BAR = 40  # characters of the longest bar


class Lengths(NamedTuple):
    """How many documents have each length; both arrays are int64 [distinct lengths].

    T tokens hold fewer than sqrt(2 T) different lengths, a few megabytes for a trillion, so all of them are kept.
    """

    tokens: np.ndarray  # ascending; the end-of-document token counts
    documents: np.ndarray

    def percentile(self, percent: int) -> int:
        """Return the smallest length that at least `percent` percent of the documents do not exceed."""
        below = np.cumsum(self.documents)
        return int(self.tokens[np.searchsorted(100 * below, percent * below[-1])])

    def by_powers_of_two(self) -> dict[int, int]:
        """Count the documents of 2^k to 2^(k+1) - 1 tokens by k, from the shortest document's k to the longest's."""
        powers = np.frexp(self.tokens)[1] - 1
        counts = np.bincount(powers, self.documents).astype(np.int64)
        return dict(enumerate(counts[powers[0] :].tolist(), int(powers[0])))


def show(folder: Path, samples: int, seed: int, plot: Path) -> Iterator[str]:
    """Yield paragraphs about a prepared folder; at last, draw the lengths of its documents in the .png `plot`.

    The paragraphs show the beginnings of `samples` documents of each split, chosen by `seed`.

    Raises:
        UserError: the folder is not prepared or is damaged, `plot` cannot be written, matplotlib is missing.
    """
    manifest = read_manifest(folder)
    require_file_writable(plot)
    heading = f"{folder}: token ids {manifest.dtype} of a vocabulary of {manifest.vocab_size:,}"
    sources = [f"source {source}" for source in manifest.sources]
    yield "\n".join([heading, f"tokenizer sha256 {manifest.tokenizer_sha256}", *sources])
    lengths = {}
    for name, split in manifest.splits.items():
        if not split.documents:
            yield f"{name}: no documents"
            continue
        tokens = TokenSet(folder, name)
        lengths[name] = count_lengths(tokens.document_bounds_by_shard())
        yield f"{name}: {_describe(split, lengths[name])}\n{_histogram(lengths[name])}"
        yield from _sample_documents(tokens, name, samples, seed)
    write_atomically(plot, _plot(lengths))
    yield f"lengths of documents drawn in {plot}"


def count_lengths(bounds_by_shard: Iterable[np.ndarray]) -> Lengths:
    """Count the documents of each length, from the int64 [documents, 2] bounds of the documents of each shard."""
    documents: Counter[int] = Counter()
    for bounds in bounds_by_shard:
        documents.update((bounds[:, 1] - bounds[:, 0]).tolist())
    return Lengths(*np.array(sorted(documents.items())).T)


def _sample_documents(tokens: TokenSet, split: str, samples: int, seed: int) -> Iterator[str]:
    """Yield the beginnings of documents chosen by the seed, each under its number in the split."""
    tokenizer = load_tokenizer(tokens.folder)
    total = tokens.split.documents
    chosen = np.random.default_rng(seed).choice(total, min(samples, total), replace=False, shuffle=False)
    before = 0  # documents of the shards before
    for bounds in tokens.document_bounds_by_shard():
        for index in sorted((chosen - before)[(before <= chosen) & (chosen < before + len(bounds))].tolist()):
            start, stop = bounds[index].tolist()
            # A character has at most four tokens, one a byte.
            text = tokenizer.decode(tokens.read(start, min(stop - 1, start + 4 * CHARACTERS)).tolist())
            yield f"{split} document {before + index:,}, {stop - start:,} tokens:\n{_indented(text[:CHARACTERS])}"
        before += len(bounds)


def _indented(text: str) -> str:
    """Indent a text and escape what would control the terminal that prints it."""
    safe = (c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    return textwrap.indent("".join(safe), "    ")


def _describe(split: Split, lengths: Lengths) -> str:
    median, p90, p99 = (lengths.percentile(percent) for percent in (50, 90, 99))
    return (
        f"{split.tokens:,} tokens of {split.documents:,} documents; shards: {len(split.shards):,}; "
        f"text: {split.text_bytes:,} bytes, {split.text_bytes / split.tokens:.3f} a token\n"
        f"tokens a document, its end included: mean {split.tokens / split.documents:,.1f}, median {median:,}, "
        f"p90 {p90:,}, p99 {p99:,}, longest {lengths.tokens[-1]:,}"
    )


def _histogram(lengths: Lengths) -> str:
    counts = lengths.by_powers_of_two()
    most, total = max(counts.values()), sum(counts.values())
    return "\n".join(
        f"{1 << k:>11,} - {(2 << k) - 1:>11,} {count:>13,} {count / total:>6.1%} |{'#' * round(BAR * count / most)}"
        for k, count in counts.items()
    )


def _plot(splits: Mapping[str, Lengths]) -> bytes:
    """Draw the share of each split's documents in each power of two, as a PNG."""
    figure = new_figure(7, 4.5)
    axes = figure.subplots()
    for name, lengths in splits.items():
        counts = lengths.by_powers_of_two()
        edges = [2.0**k for k in [*counts, max(counts) + 1]]
        total = sum(counts.values())
        shares = [count / total for count in counts.values()]
        axes.stairs(shares, edges, fill=True, alpha=0.4, label=f"{name}, {total:,}")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a document, its end included", ylabel="share of the split's documents")
    axes.set_title("Lengths of documents")
    axes.grid(alpha=0.3)
    if splits:
        axes.legend()
    return png_bytes(figure)
