"""The command line as its user sees it: help, errors of one line, full disks."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, VOCAB, Run, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tostlm.checkpoint import checkpoints
from tostlm.data import Tokenizer, read_manifest, verify
from tostlm.data.preparation.plan import read_plan
from tostlm.errors import EXIT_LOST_RANK, EXIT_USER_ERROR
from tostlm.main import main

SUBCOMMANDS = [
    *("quickstart", "config", "tokenizer", "prepare", "data", "plan", "doctor", "train", "eval", "generate", "bench"),
    *("checkpoint", "convert", "study", "submit"),
]


def test_help_shows_the_pipeline_and_all_subcommands() -> None:
    printed = succeed(tostlm("--help"))
    assert "text -> tokenizer -> token shards -> training -> checkpoint" in printed
    listed = re.findall(r"^  (\w+)  ", printed.split("Commands:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(SUBCOMMANDS)


@pytest.mark.parametrize("subcommand", SUBCOMMANDS)
def test_every_subcommand_has_help(subcommand: str) -> None:
    assert len(succeed(tostlm(subcommand, "--help"))) > 100


def test_help_imports_nothing_heavy() -> None:
    """Heavy libraries are imported when a subcommand runs."""
    code = "import sys, tostlm.cli; assert not {'torch', 'deepspeed', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["tokenizer", "train", "--source", "x.txt", "--out", "t.model", "--vocab-size", "10"],
        ["train", "x.yaml", "--nproc", "0"],
        ["eval", "perplexity", "x", "--windows", "0"],
        ["generate", "x", "--tokens", "-1"],
        ["generate", "x", "--seed", "-1"],
        ["bench", "train", "x.yaml", "--threads", "0"],
    ],
    ids=lambda arguments: arguments[-2],
)
def test_numbers_out_of_range_are_errors(arguments: list[str]) -> None:
    result = tostlm(*arguments)
    assert result.returncode == 2
    assert arguments[-2] in result.stderr
    assert "Traceback" not in result.stderr


def test_a_config_may_be_a_shipped_name(tmp_path: Path) -> None:
    """A file of that name wins; a name that is neither is an error with the nearest one."""
    assert "run_dir: runs/tost-base\n" in succeed(tostlm("config", "show", "tost-base", cwd=tmp_path))
    fail(tostlm("train", "tost-bsae", cwd=tmp_path), "tost-bsae is neither a file nor a shipped config", "tost-base")
    fail(tostlm("train", "configs/tost-base.yml", cwd=tmp_path), "the nearest is tost-base; `tostlm config list`")
    (tmp_path / "tost-base").write_text("run_dir: [")
    fail(tostlm("config", "show", "tost-base", cwd=tmp_path), "config tost-base is not YAML")


def test_the_list_of_shipped_configs(tmp_path: Path) -> None:
    lines = succeed(tostlm("config", "list", cwd=tmp_path)).splitlines()
    assert [line.split()[0] for line in lines] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert next(line for line in lines if line.startswith("tost-base ")).split()[1:3] == ["110M", "ToST-base"]


def test_out_of_memory_in_training_is_one_line_and_restartable(run: Run) -> None:
    ended = run.train("model.depth=2000", "model.width=65536")
    assert ended.returncode == EXIT_LOST_RANK
    assert ended.stderr.startswith("tostlm: error: out of memory (")
    assert ended.stderr.count("\n") == 1
    assert "use a smaller model" in ended.stderr


def test_out_of_memory_in_other_commands_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def exhaust() -> None:
        raise MemoryError

    monkeypatch.setattr("tostlm.main.app", exhaust)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == EXIT_USER_ERROR
    assert capsys.readouterr().err.startswith("tostlm: error: out of memory (MemoryError)")


def test_outputs_are_checked_before_any_work(corpus: Path, tmp_path: Path) -> None:
    command = ["tokenizer", "train", "--source", str(corpus), "--vocab-size", "400", "--out"]
    fail(tostlm(*command, str(tmp_path)), "is a folder; name a file in it")
    fail(tostlm(*command, str(corpus / "x.model")), "cannot write in")
    fail(tostlm(*command, str(tmp_path / ("x" * 300))), "File name too long")


def test_from_text_to_shards(corpus: Path, tmp_path: Path) -> None:
    model, out = tmp_path / "tokenizer.model", tmp_path / "data"
    printed = succeed(tostlm("tokenizer", "train", "--source", str(corpus), "--vocab-size", "400", "--out", str(model)))
    assert Tokenizer.load(model).sha256 in printed
    copy = tmp_path / "more.jsonl"
    copy.write_text('{"text": "and another file"}\n')
    command = ["prepare", "--source", str(corpus), str(copy), "--tokenizer", str(model), "--out", str(out)]
    printed = succeed(tostlm(*command, "--heldout-fraction", "0.1"))
    manifest = read_manifest(out)
    assert sum(split.documents for split in manifest.splits.values()) == 61
    assert f"train {manifest.splits['train'].tokens:,} tokens" in printed
    assert "8 files match" in succeed(tostlm("data", "verify", str(out)))
    fail(tostlm(*command), "is prepared already")
    fail(tostlm("prepare", "--source", "nowhere.txt", "--tokenizer", str(model), "--out", "x"), "names no file")
    fail(tostlm("prepare", "--source", str(corpus), "--tokenizer", "no.model", "--out", "x"), "no.model is no file")
    fail(tostlm("data", "verify", str(tmp_path)), "holds no prepared data")


def test_a_tokenizer_is_trained_as_its_errors_advise(corpus: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text(corpus.read_text() + '{"text": 5}\n{"text": "' + "x" * 100_000 + '"}\n')
    command = ["tokenizer", "train", "--source", str(bad), "--vocab-size", "400", "--out", str(tmp_path / "t.model")]
    fail(tostlm(*command), "text is 5, not text", "--on-error skip")
    limited = [*command, "--on-error", "skip", "--max-document-bytes", "50000"]
    assert "dropped 1 no text, 1 record too large" in succeed(tostlm(*limited))
    fail(
        tostlm(*limited, "--keep", "language=en"), "is left; dropped: 1 no text, 60 not language=en, 1 record too large"
    )
    fail(tostlm(*command, "--on-error", "never"), "--on-error 'never'")


@pytest.mark.parametrize("kind", ["tokenizer.model", "tokenizer.json"])
def test_the_pipeline_with_an_imported_tokenizer(corpus: Path, speeches: list[str], tmp_path: Path, kind: str) -> None:
    if kind == "tokenizer.model":
        (tmp_path / "source").write_bytes(tokenizer_kinds.mistral_like(speeches, VOCAB))
    else:
        tokenizer_kinds.byte_level(speeches, ["<s>", "</s>"], VOCAB - 2).save(str(tmp_path / "source"))
    imported, data = str(tmp_path / "imported"), tmp_path / "data"
    succeed(tostlm("tokenizer", "import", str(tmp_path / "source"), "--out", imported))
    command = ["prepare", "--source", str(corpus), "--tokenizer", imported, "--heldout-fraction", "0.2"]
    succeed(tostlm(*command, "--out", str(data)))
    assert (data / kind).read_bytes() == Path(imported).read_bytes()
    assert "8 files match" in succeed(tostlm("data", "verify", str(data)))
    run = Run(tmp_path, data)
    succeed(run.train("train.steps=2", "train.save_every_steps=2"))
    succeed(run.train("train.steps=3", "train.save_every_steps=1"))
    assert (checkpoints(run.dir)[-1] / kind).read_bytes() == Path(imported).read_bytes()
    prompt = "Fellow  citizens \u2581,"
    assert succeed(tostlm("generate", str(run.dir), "--prompt", prompt, "--tokens", "5")).startswith(prompt)
    succeed(tostlm("eval", "perplexity", str(run.dir), "--contexts", "16", "--windows", "2"))


def test_a_full_disk_while_preparing(small_disk: Path, corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "t.model").write_bytes(tokenizer.content)
    copies = [tmp_path / f"{number}.jsonl" for number in range(10)]
    for copy in copies:
        copy.write_bytes(corpus.read_bytes())
    source = ["--source", *map(str, copies), "--tokenizer", str(tmp_path / "t.model"), "--unit-bytes", "9000"]
    command = ["prepare", *source, "--out", str(small_disk / "data")]
    fail(tostlm(*command), "No space left on device", "what was finished stays")
    finished = len(list((small_disk / "data").glob("units/0*/result.json")))
    assert 0 < finished < len(read_plan(small_disk / "data").units)
    assert not (small_disk / "data" / "manifest.json").exists()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    succeed(tostlm(*command))
    assert f"{sum(1 for _ in verify(small_disk / 'data'))} files" in succeed(
        tostlm("data", "verify", str(small_disk / "data"))
    )
