"""The corpora that models are pretrained on stream from a hub: the real client against a hub on loopback."""

import gzip
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from tests.conftest import ROOT
from tests.data.preparation.hub import Hub, serve
from tests.data.test_shards import texts_of as texts_of_folder
from tostlm.data import TRAIN, Tokenizer

FINEWEB, C4, SLIMPAJAMA = "HuggingFaceFW/fineweb:sample-10BT", "allenai/c4:en", "cerebras/SlimPajama-627B"
OPENWEBTEXT = "Skylion007/openwebtext"
ROWS = 40  # of a file
DOCUMENTATION = (ROOT / "docs" / "data.md").read_text().replace("\\\n", "")
README = {
    FINEWEB: """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
---
""",
    C4: """---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
""",
    SLIMPAJAMA: "---\nlanguage:\n- en\n---\n",  # splits are folders
    OPENWEBTEXT: "---\nconfigs:\n- config_name: plain_text\n  data_files: plain_text/*\n  default: true\n---\n",
}
TRAIN_FILES = {
    FINEWEB: [f"sample/10BT/{n:03}_00000.parquet" for n in range(3)],
    C4: [f"en/c4-train.{n:05}-of-00003.json.gz" for n in range(3)],
    SLIMPAJAMA: [f"train/chunk{chunk}/example_train_{n}.jsonl.zst" for chunk in (1, 2) for n in (0, 1)],
    OPENWEBTEXT: [f"plain_text/train-{n:05}-of-00002.parquet" for n in range(2)],
}
OTHER_FILES = {
    FINEWEB: ["data/CC-MAIN-2013-20/000_00000.parquet"],
    C4: ["en/c4-validation.00000-of-00001.json.gz", "de/c4-de.tfrecord-00000-of-00001.json.gz"],
    SLIMPAJAMA: ["validation/chunk1/example_holdout_0.jsonl.zst", "test/chunk1/example_holdout_0.jsonl.zst"],
    OPENWEBTEXT: [],
}


def texts_of(file: str) -> list[str]:
    """Documents of a file, which no compression makes as small as metadata."""
    source = random.Random(file)
    return [f"{file} {n} \u2581\n{source.randbytes(300).hex()}" for n in range(ROWS)]


def row(source: str, text: str, n: int) -> dict[str, object]:
    """A document with the columns it has in that corpus."""
    if source == C4:
        return {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.org/{n}"}
    if source == SLIMPAJAMA:
        return {"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}}
    if source == OPENWEBTEXT:
        return {"text": text}
    return {
        "text": text,
        "id": f"<urn:uuid:{n}>",
        "dump": "CC-MAIN-2013-20",
        "url": f"https://example.org/{n}",
        "date": "2013-05-18T05:48:54Z",
        "file_path": "s3://commoncrawl/crawl-data/x.warc.gz",
        "language": "en",
        "language_score": 0.97,
        "token_count": len(text),
    }


def content(source: str, file: str) -> bytes:
    rows = [row(source, text, n) for n, text in enumerate(texts_of(file))]
    if source in (FINEWEB, OPENWEBTEXT):
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, row_group_size=ROWS // 4)
        return buffer.getvalue()
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(lines) if source == C4 else zstandard.compress(lines)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    for source, readme in README.items():
        root = folder / source.partition(":")[0]
        for file in [*TRAIN_FILES[source], *OTHER_FILES[source]]:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).write_bytes(content(source, file))
        (root / "README.md").write_text(readme)
    with serve(folder) as hub:
        yield hub


def alone(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process that knows of no other hub and has nothing cached."""
    temporary = home / "tmp"
    temporary.mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    addresses = {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1"}
    return {**environment, **addresses, "HF_HOME": str(home), "TMPDIR": str(temporary)}


def client(hub: Hub, home: Path, code: str) -> Any:
    """Return what such a process prints as JSON."""
    script = f"import json\nfrom tostlm.data import documents\n{code}"
    done = subprocess.run(
        [sys.executable, "-c", script], env=alone(hub, home), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("source", README)
def test_documents_stream_in_the_order_of_files(hub: Hub, tmp_path: Path, source: str) -> None:
    found = client(hub, tmp_path / "home", f"print(json.dumps(list(documents([{source!r}]))))")
    assert found == [text for file in TRAIN_FILES[source] for text in texts_of(file)]
    kept = {path: path.stat().st_size for path in (tmp_path / "home").rglob("*") if path.is_file()}
    assert max(kept.values()) < 2000 < min(len(content(source, file)) for file in TRAIN_FILES[source]), kept


def test_a_shard_is_a_file(hub: Hub, tmp_path: Path) -> None:
    """Preparation gives each work unit the shards that `datasets` says it has."""
    code = f"""
import datasets
found = {{}}
for source in {[*README]}:
    name, _, config = source.partition(":")
    data = datasets.load_dataset(name, config or None, split="train", streaming=True)
    texts = lambda count: [[row["text"] for row in data.shard(count, n, contiguous=True)] for n in range(count)]
    found[source] = data.num_shards, texts(data.num_shards), texts(2)
print(json.dumps(found))
"""
    found = client(hub, tmp_path / "home", code)
    for source, (count, each, halves) in found.items():
        files = [texts_of(file) for file in TRAIN_FILES[source]]
        assert count == len(files)
        assert each == files
        assert halves[0] + halves[1] == [text for file in files for text in file]
        assert all(len(half) % ROWS == 0 for half in halves)
    assert [*found] == [*README]


def test_another_split_and_the_first_document_alone(hub: Hub, tmp_path: Path) -> None:
    (heldout, _) = OTHER_FILES[C4]
    before = dict(hub.bytes_sent)
    found = client(hub, tmp_path / "home", f"print(json.dumps(next(documents(['{C4}@validation', '{FINEWEB}']))))")
    assert found == texts_of(heldout)[0]
    fetched = {name for name, count in hub.bytes_sent.items() if count != before.get(name)}
    assert not {f"HuggingFaceFW/fineweb/{file}" for file in TRAIN_FILES[FINEWEB]} & fetched
    assert f"allenai/c4/{heldout}" in fetched


def test_what_the_hub_does_not_have(hub: Hub, tmp_path: Path) -> None:
    code = """
from tostlm.errors import UserError
said = {}
for source in ("nobody/nothing", "allenai/c4:xx", "allenai/c4:en@nosplit"):
    try:
        list(documents([source]))
    except UserError as error:
        said[source] = str(error)
print(json.dumps(said))
"""
    said = client(hub, tmp_path / "home", code)
    assert [*said] == ["nobody/nothing", "allenai/c4:xx", "allenai/c4:en@nosplit"]
    for source, message in said.items():
        assert message.startswith(f"source {source} is no file here and the Hugging Face hub did not give it: ")
        assert "\n" not in message
    assert "'en'" in said["allenai/c4:xx"]


COMMANDS = re.findall(r"^tostlm prepare --source [A-Z0-9a-z]+/.*$", DOCUMENTATION, re.MULTILINE)


def test_the_usual_corpora_are_documented() -> None:
    assert [shlex.split(command)[3] for command in COMMANDS] == [FINEWEB, C4, OPENWEBTEXT, SLIMPAJAMA]


@pytest.mark.parametrize(
    "command",
    [*COMMANDS[:2], *(pytest.param(command, marks=pytest.mark.slow) for command in COMMANDS[2:])],
    ids=lambda command: shlex.split(command)[3],
)
def test_the_documented_command(hub: Hub, tokenizer: Tokenizer, tmp_path: Path, command: str) -> None:
    """Two processes, a shard a work unit; the texts are all there, in order."""
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.content)
    arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", *arguments, "--workers", "2", "--heldout-fraction", "0"],
        cwd=tmp_path,
        env={**alone(hub, tmp_path / "home"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / arguments[arguments.index("--out") + 1]
    assert texts_of_folder(out, TRAIN) == [text for file in TRAIN_FILES[arguments[3]] for text in texts_of(file)]
