"""Every command of the README runs as a reader would run it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, tostlm
from tostlm.config import load_config
from tostlm.data import documents, train_tokenizer
from tostlm.model import count_parameters

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_first_two_commands() -> None:
    assert blocks("sh")[0].split("\n")[:2] == ["make quickstart", "make test"]
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
    makefile = (ROOT / "Makefile").read_text()
    for line in ("tostlm quickstart", "ruff check .", "ruff format --check .", "mypy"):
        assert f"$(BIN)/{line}\n" in makefile
    for tests in ("not slow and not timed", "timed and not slow", "slow"):  # each test is in one of them
        assert re.search(rf"\$\(BIN\)/pytest .*-m \"?{tests}\"?\n", makefile)


def test_every_command_and_the_python_snippet_run(tmp_path: Path, speeches: list[str]) -> None:
    (tmp_path / "mydir").mkdir()
    for half in (0, 1):
        rows = [json.dumps({"text": text}) for text in speeches[half::2]]
        (tmp_path / "mydir" / f"{half}.jsonl").write_text("\n".join(rows) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(command: list[str]) -> None:
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, f"{command[-1]}\n{result.stdout}{result.stderr}"

    for command in blocks("sh")[1].splitlines():
        run(["sh", "-c", command])
    (snippet,) = blocks("python")
    run([sys.executable, "-c", snippet])
    assert (tmp_path / "runs" / "mine" / "tost" / "perplexity.png").exists()


def test_every_subcommand_is_shown() -> None:
    subcommands = set(re.findall(r"^  (\w+)  ", tostlm("--help").stdout.split("Commands:")[1], re.MULTILINE))
    assert subcommands == {"quickstart"} | {line.split()[1] for line in blocks("sh")[1].splitlines()}


def test_the_table_of_configs() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        shape = " x ".join(str(config["model"][key]) for key in ("depth", "width", "heads"))
        row = next(line for line in README.splitlines() if line.startswith(f"| `{path.stem}` |"))
        assert shape in row
        size = count_parameters(load_config(path).model) / 1e6
        assert (f"{size:.0f}M" if size > 10 else f"{size:.1f}M") in row
        assert f"{int(config['train']['batch_tokens']):,} | {int(config['train']['steps']):,} |" in row


def test_links_are_not_broken() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "tokenizer").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page}: {target}"


def test_the_tokenizer_recipe_reproduces_its_digest(tmp_path: Path) -> None:
    recipe = (ROOT / "tokenizer" / "speeches-4096.sh").read_text()
    found = re.search(r"--source '(\S+)' --vocab-size (\d+)", recipe)
    assert found is not None
    source, vocab_size = found.groups()
    tokenizer = train_tokenizer(documents([source]), int(vocab_size), tmp_path / "t.model")
    assert f"`{tokenizer.sha256}`" in (ROOT / "tokenizer" / "README.md").read_text()


@pytest.mark.parametrize("word", ["TODO", "FIXME", "XXX"])
def test_no_open_todo(word: str) -> None:
    for path in [*(ROOT / "tostlm").rglob("*.py"), *ROOT.glob("*.md")]:
        assert word not in path.read_text(), path
