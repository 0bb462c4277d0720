"""A page of what training and evaluations found: complete in one file, right in every number, at any stage."""

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.apt import missing_reason
from tests.conftest import Run, fail, succeed, tostlm
from tostlm.checkpoint import checkpoints
from tostlm.config import load_config
from tostlm.errors import UserError
from tostlm.eval.chapters import STATE_CONTEXTS
from tostlm.eval.page import write_page
from tostlm.eval.report import read_report
from tostlm.eval.summary import flops_after, read_runs
from tostlm.files import format_bytes, short_names
from tostlm.model import count_parameters, state_bytes, training_flops_per_token

VOID = {"meta", "img", "link", "br", "hr"}
SCORE = {"context": 1e30, "nats": 1, "low": None, "high": None, "bits_per_byte": 1, "perplexity": 1, "gain": None}
MODEL = {"name": "a", "checkpoint": "b", "step": 1, "positions": None, "data": "c", "clamped": None}
WORDS = {"word_perplexity": 1, "tokens": 1, "documents": 1}
LONG = json.dumps({"protocol": "windows", "models": [{**MODEL, "scores": [{**SCORE, **WORDS}]}]})  # no such context is
NAME = "a <script>|b"  # of a run's folder


class Page(HTMLParser):
    """The parts of a page; a tag that is not closed in its place is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}  # by the section's id
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[str] = []
        self.section = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = dict(attrs)["id"]
            self.tables[self.section] = []
        elif tag == "tr":
            self.tables[self.section].append([])
        elif tag in ("th", "td"):
            self.tables[self.section][-1].append("")
        elif re.fullmatch(r"h\d", tag):
            self.headings.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts[self.section] = self.texts.get(self.section, "") + data
        if self.open and self.open[-1] in ("th", "td"):
            self.tables[self.section][-1][-1] += data


class Reported(NamedTuple):
    folders: list[Path]
    out: Path
    html: str
    page: Page


DECODE = [
    {"model": "tost", "context": 512, "milliseconds": 4.0, "prefill_tokens_per_second": 12345.0, "state_bytes": 2048},
    {"model": "gpt2", "context": 512, "milliseconds": 8.0, "prefill_tokens_per_second": None, "state_bytes": 65536},
]


@pytest.fixture(scope="module")
def reported(trained: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Reported:
    """Two runs that were evaluated by two protocols, one of a name that has to be escaped, and their page."""
    folder = tmp_path_factory.mktemp("page")
    tssa = Path(shutil.copytree(trained["tssa"].dir, folder / NAME))
    softmax = Path(shutil.copytree(trained["softmax"].dir, folder / "gpt2"))
    command = ["eval", "perplexity", str(tssa), str(softmax), "--contexts", "16,64,512", "--windows", "7"]
    succeed(tostlm(*command))
    succeed(tostlm(*command, "--protocol", "stream", "--out", str(tssa / "stream")))
    asked = ["--contexts", "32,128", "--pairs", "2,4", "--sequences", "2"]
    succeed(tostlm("eval", "recall", str(tssa), str(softmax), *asked))
    (folder / "decode.json").write_text(json.dumps({"machine": "a <small> machine", "decode": DECODE}))
    options = ["--out", str(folder / "out"), "--decode", str(folder / "decode.json")]
    printed = succeed(tostlm("eval", "report", str(tssa), str(softmax), *options))
    assert f"written to {folder}/out/report.html" in printed
    html = (folder / "out" / "report.html").read_text()
    return Reported([tssa, softmax], folder / "out", html, Page(html))


def rows(page: Page, section: str) -> dict[str, list[str]]:
    return {row[0]: row[1:] for row in page.tables[section]}


def test_a_page_needs_nothing_beside_it(reported: Reported) -> None:
    links = [value for _, has in reported.page.attributes for key, value in has.items() if key in ("src", "href")]
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    assert "http" not in reported.html and "url(" not in reported.html and "@import" not in reported.html
    images = [has for tag, has in reported.page.attributes if tag == "img"]
    assert [str(has["alt"]).endswith("The table has the numbers.") for has in images] == [True] * 6
    assert reported.page.attributes[0] == ("html", {"lang": "en"})
    assert reported.page.headings == ["h1", *["h2"] * 7]
    ids = [has["id"] for _, has in reported.page.attributes if "id" in has]
    assert len(set(ids)) == len(ids)
    assert [link[1:] for link in links if link.startswith("#")] == list(reported.page.tables)


def test_names_are_escaped(reported: Reported) -> None:
    assert "<script" not in reported.html and "<small>" not in reported.html
    assert rows(reported.page, "models")[""] == [NAME, "gpt2"]
    assert "a <small> machine" in reported.page.texts["decoding"]
    markdown = (reported.out / "report.md").read_text()
    assert "<script" not in markdown and r"| a &lt;script>\|b | gpt2 |" in markdown
    for name in re.findall(r"!\[.*\]\((.*)\)", markdown):
        assert (reported.out / name).read_bytes().startswith(b"\x89PNG")


def test_the_models_are_as_their_configs_say(reported: Reported) -> None:
    facts = rows(reported.page, "models")
    for column, folder in enumerate(reported.folders):
        config = load_config(folder / "config.yaml")
        assert facts["Parameters"][column] == f"{count_parameters(config.model):,}"
        assert facts["Training tokens"][column] == "3,072"
        assert facts["Steps"][column] == "6 of 6"
        assert facts["Learning rate"][column] == "0.01"
        sizes = [state_bytes(config.model, n) for n in STATE_CONTEXTS if column == 0]
        states = [row[column] for head, row in rows(reported.page, "state").items() if head != "tokens"]
        assert states == ([format_bytes(size) for size in sizes] or ["-"] * len(STATE_CONTEXTS))
    assert facts["Layers"] == ["2 tssa", "2 softmax"]
    assert facts["Positions"] == ["unlimited", "64 learned"]
    assert [format_bytes(n) for n in (1000, 1 << 11, 3 << 29)] == ["1000 bytes", "2 KiB", "1.5 GiB"]


@pytest.mark.parametrize(("section", "file"), [("context", "perplexity.json"), ("position", "stream/perplexity.json")])
def test_losses_are_those_of_the_evaluations(reported: Reported, section: str, file: str) -> None:
    models = json.loads((reported.folders[0] / file).read_text())["models"]
    table = rows(reported.page, section)
    assert table["tokens"] == [NAME, "gpt2"]
    for column, model in enumerate(models):
        expected = {
            f"{s['context']:,}": f"{s['nats']:.4f} ± {(s['high'] - s['low']) / 2:.4f} ({s['perplexity']:.2f})"
            for s in model["scores"]
        }
        shown = {context: cells[column] for context, cells in table.items() if context != "tokens"}
        assert {context: cell for context, cell in shown.items() if cell != "-"} == expected
    assert ("improve" in reported.page.texts[section]) == (section == "context")


def test_a_report_is_read_as_it_was_written(reported: Reported) -> None:
    path = reported.folders[0] / "perplexity.json"
    protocol, models = read_report(path)
    written = json.loads(path.read_text())["models"]
    assert protocol == "same-targets"
    for model, own in zip(models, written, strict=True):
        assert [score._asdict() for score in model.scores] == [
            {key: value for key, value in score.items() if key != "gain"} for score in own["scores"]
        ]
        gains = {score["context"]: score["gain"] for score in own["scores"] if score["gain"]}
        assert {context: found._asdict() for context, found in model.gains} == gains


def test_training_is_as_it_was_logged(reported: Reported, trained: dict[str, Run]) -> None:
    table = rows(reported.page, "training")
    for name, folder in zip((NAME, "gpt2"), reported.folders, strict=True):
        config, losses = load_config(folder / "config.yaml"), trained["tssa" if name == NAME else "softmax"]
        found = losses.metrics("validation")
        flops = f"{3072 * training_flops_per_token(config.model, 64):.3g}"
        best = min(found, key=lambda step: found[step])
        cells = [f"{len(found)}", "3,072", flops, f"{found[6]:.4f}"]
        assert table[name][:4] == cells
        assert table[name][5:] == [f"{found[best]:.4f}", f"{512 * best:,}"]


def test_answers_and_speeds(reported: Reported) -> None:
    models = json.loads((reported.folders[0] / "recall.json").read_text())["models"]
    head, *table = reported.page.tables["recall"]
    assert head == ["task", "pairs", "tokens", NAME, "gpt2"]
    shown = {
        (task, pairs, tokens, name): cell
        for task, pairs, tokens, *row in table
        for name, cell in zip(head[3:], row, strict=True)
    }
    expected = {}
    for model, name in zip(models, (NAME, "gpt2"), strict=True):
        for found in model["results"]:
            beside = (
                f"best {found['best_nats']:.2f}" if found["task"] == "chain" else f"first {found['first_nats']:.2f}"
            )
            cell = f"{found['accuracy']:.1%}, {found['nats']:.2f} nats ({beside})"
            expected[found["task"], f"{found['load'] or '-'}", f"{found['tokens']}", name] = cell
    assert {case: cell for case, cell in shown.items() if cell != "-"} == expected
    assert {case for case, cell in shown.items() if cell == "-"} == {
        (*case[:3], "gpt2") for case in expected if "128" in case
    }
    assert reported.page.tables["decoding"][1:] == [
        ["tost", "512", "4.00", "250", "12,345", "2 KiB"],
        ["gpt2", "512", "8.00", "125", "-", "64 KiB"],
    ]


def test_what_is_missing_names_its_command(trained: dict[str, Run], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained["tssa"].dir, tmp_path / "my run"))
    for name in ("metrics.jsonl", "perplexity.json", "recall.json"):
        (run / name).unlink(missing_ok=True)
    assert write_page([run], None, None, "A & B") == run / "report.html"
    page = Page((run / "report.html").read_text())
    assert page.texts[""].count("A & B") == 2
    for section, command in {
        "context": f"tostlm eval perplexity '{run}'",
        "position": f"tostlm eval perplexity '{run}' --protocol stream --out '{run}/stream'",
        "training": "tostlm train CONFIG",
        "recall": f"tostlm eval recall '{run}'",
        "decoding": "tostlm bench decode --out decode.json",
    }.items():
        assert f"Not measured yet: {command}" in page.texts[section]
        assert page.tables[section] == []
    assert rows(page, "models")["Steps"] == ["0 of 6"]
    assert re.findall("^## .*", (run / "report.md").read_text(), re.MULTILINE) == ["## Models", "## State"]


def test_checkpoints_of_one_run(trained: dict[str, Run]) -> None:
    first, last = checkpoints(trained["tssa"].dir)
    runs = read_runs([first, last, trained["tssa"].dir])
    assert [(run.name, run.step, run.tokens) for run in runs] == [("run step 3", 3, 1536), ("run step 6", 6, 3072)]
    assert all(entry.step <= 3 for entry in runs[0].validation)
    config = trained["tssa"].config("data.curriculum=[{until_step: 2, context_tokens: 32}]")
    short, long = (training_flops_per_token(config.model, context) for context in (32, 64))
    assert flops_after(config, 1) == 512 * short
    assert flops_after(config, 6) == 1024 * short + 2048 * long
    assert short_names([Path("/a/x/seed0"), Path("/a/y/seed0")]) == ["x/seed0", "y/seed0"]


def test_mistakes(trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(trained["tssa"].dir, tmp_path / "run"))

    def refuse(match: str, decode: Path | None = None, path: Path = run) -> None:
        with pytest.raises(UserError, match=match):
            write_page([path], tmp_path / "out", decode, None)

    fail(tostlm("eval", "report", str(tmp_path)), f"{tmp_path} is neither a checkpoint nor the folder of a run; it has")
    refuse("nothing is neither a checkpoint nor", path=tmp_path / "nothing")
    refuse(r"none.json cannot be read: No such file .* `tostlm bench decode` writes it", tmp_path / "none.json")
    file = tmp_path / "decode.json"
    file.write_text(json.dumps({"machine": "m", "decode": [{**DECODE[0], "milliseconds": 0}]}))
    refuse(r"decode.json is not what `tostlm bench decode` writes \(decode.0.milliseconds: .*greater than 0", file)
    wrong: dict[str, list[Any]] = {
        "perplexity.json": [LONG, '{"protocol"', "[]", '{"models": []}', '{"protocol": "x", "models": [1]}'],
        "recall.json": ["", "[]", '{"models": [{"name": "a"}]}', '{"models": 1}'],
    }
    for name, contents in wrong.items():
        for content in contents:
            (run / name).write_text(content)
            refuse(rf"run/{name} is not what `tostlm eval {name.split('.')[0]}` writes .*; run that again, or move the")
        (run / name).unlink()
    with pytest.raises(UserError, match="cannot write in /proc/no"):
        write_page([run], Path("/proc/no"), None, None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refuse(r"pip install 'tostlm\[eval\]'")


def test_metrics_that_were_changed_are_left_out(trained: dict[str, Run], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained["tssa"].dir, tmp_path / "$\\frac$ \u4e2d"))
    before = read_runs([run])[0]
    with (run / "metrics.jsonl").open("a") as file:
        for changed in ({"loss": "x"}, {"loss": [1]}, {"step": 10**400, "loss": 1.0}, {"tokens_per_second": "fast"}):
            file.write(json.dumps({"kind": "validation", "step": 6, **changed}) + "\n")
        file.write('{"kind": "validation", "step": 6, "loss": 900.0}\n')
    write_page([run], None, None, None)  # of a name in another script, and of what matplotlib takes for a formula
    after = read_runs([run])[0]
    assert [entry.loss for entry in after.validation] == [*(entry.loss for entry in before.validation), 900.0]
    assert after.tokens_per_second == before.tokens_per_second and after.step == 6


PROBE = """<!doctype html>
<iframe id="page" src="report.html" style="width: WIDTHpx; height: 800px"></iframe>
<script>
addEventListener("load", () => {
  const page = document.getElementById("page").contentDocument;
  const widths = [...page.images].map(image => image.naturalWidth);
  document.title = JSON.stringify({widths, page: page.documentElement.scrollWidth});
});
</script>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_a_browser_shows_it(reported: Reported, width: int) -> None:
    if reason := missing_reason(["chromium"], ["chromium", "fonts-dejavu-core"]):
        pytest.skip(reason)
    probe = reported.out / "probe.html"
    probe.write_text(PROBE.replace("WIDTH", str(width)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    command = ["chromium", *options, "--virtual-time-budget=10000", probe.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(re.search("<title>(.*)</title>", done.stdout)[1])
    assert len(found["widths"]) == 6 and min(found["widths"]) > 500
    assert found["page"] <= width  # only tables and plots scroll sideways
