"""What datatrove writes, text and metadata, is read."""

from pathlib import Path

import pytest
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.writers import JsonlWriter, ParquetWriter

from tests.data.preparation.test_prepare import all_texts
from tostlm.data import PreparationSettings, Tokenizer, prepare


@pytest.mark.parametrize("writer", [JsonlWriter, ParquetWriter])
def test_the_output_of_a_pipeline(
    writer: type, speeches: list[str], tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    crawl = [
        Document(text=text, id=str(n), metadata={"language": "en" if n % 2 else "fr", "score": n / 60})
        for n, text in enumerate(speeches)
    ]
    LocalPipelineExecutor([crawl, writer(str(tmp_path / "unique"))], logging_dir=str(tmp_path / "logs")).run()
    keep = ("metadata.language=en", "metadata.score>=0.5")
    settings = PreparationSettings(sources=(str(tmp_path / "unique"),), id_column="id", keep=keep)
    prepare(settings, tokenizer, tmp_path / "out")
    assert sorted(all_texts(tmp_path / "out")) == sorted(speeches[31::2])
