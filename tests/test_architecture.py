"""Which packages may import which, and what else keeps the code readable."""

import ast
import re
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "tostlm"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_IMPORT = {  # of tostlm's own packages and modules
    "autograd": set(),
    "shapes": set(),
    "accelerators": set(),
    "device": {"accelerators", "errors"},
    "parallel": {"autograd", "shapes"},
    "chain": {"autograd"},
    "tssa": {"autograd", "parallel", "shapes"},
    "model": {"autograd", "chain", "parallel", "shapes", "tssa"},
    "optim": set(),
    "errors": set(),
    "files": {"errors"},
    "plots": {"errors"},
    "config": {"errors", "model"},
    "data": {"errors", "files", "plots"},
    "launch": {"errors", "files"},
    "formats": {"config", "data", "errors", "files", "model"},
    "checkpoint": {"config", "data", "errors", "files", "formats", "launch", "model", "optim"},
    "train": {"checkpoint", "config", "data", "device", "errors", "files", "launch", "model", "optim", "tssa"},
    "plan": {"accelerators", "checkpoint", "config", "device", "errors", "files", "model"},
    "doctor": {"checkpoint", "config", "data", "device", "errors", "files", "launch", "plan", "train"},
    "slurm": {
        "accelerators",
        "checkpoint",
        "config",
        "data",
        "errors",
        "files",
        "formats",
        "launch",
        "plan",
        "study",
        "train",
    },
    "eval": {
        "checkpoint",
        "config",
        "data",
        "device",
        "errors",
        "files",
        "formats",
        "launch",
        "model",
        "plots",
        "shapes",
    },
    "bench": {
        "config",
        "data",
        "device",
        "errors",
        "eval",
        "files",
        "formats",
        "launch",
        "model",
        "plan",
        "plots",
        "train",
        "tssa",
    },
    "convert": {"checkpoint", "config", "data", "errors", "eval", "files", "formats", "model", "tssa"},
    "study": {"checkpoint", "config", "data", "device", "errors", "eval", "files", "launch", "model", "plots"},
}


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    "path", [p for p in FILES if package_of(p) in MAY_IMPORT], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_package_imports_only_what_it_may(path: Path) -> None:
    own = {name.split(".")[1] for name in imports(path) if name.startswith("tostlm.")}
    assert own - {package_of(path)} <= MAY_IMPORT[package_of(path)]


def test_every_package_is_listed() -> None:
    assert {package_of(path) for path in FILES} == MAY_IMPORT.keys() | {
        "__init__",
        "__main__",
        "cli",
        "main",
        "quickstart",
    }


def importers(module: str) -> set[str]:
    return {str(p.relative_to(PACKAGE)) for p in FILES if any(i.split(".")[0] == module for i in imports(p))}


def test_large_libraries_are_imported_in_few_files() -> None:
    assert importers("deepspeed") == {
        "checkpoint/deepspeed_state.py",
        "config/deepspeed_block.py",
        "formats/deepspeed.py",
        "train/engine.py",
    }
    assert {path.split("/")[0] for path in importers("transformers")} == {"bench", "convert", "eval"}
    assert importers("lm_eval") == {"eval/harness.py", "eval/standard_sets.py"}
    assert importers("wandb") == {"train/metric_writers.py"}
    assert importers("matplotlib") == {"plots.py"}


def test_the_operator_and_the_models_import_torch_alone() -> None:
    for path in FILES:
        if package_of(path) in ("tssa", "chain", "model"):
            foreign = {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"tostlm"}
            assert foreign <= ({"torch", "triton"} if path.name.startswith("triton") else {"torch"}), path


def test_only_training_and_export_import_the_compiler() -> None:
    """It takes as long to import as everything else that a command needs."""
    script = "import sys, tostlm.data, tostlm.eval, tostlm.slurm; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_no_module_imports_itself_through_others() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:  # imports within functions come later
            if isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names} & names.keys()
                graph[name] |= submodules or {node.module} & names.keys()
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_two_classes_share_a_name() -> None:
    classes = [n.name for path in FILES for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ClassDef)]
    assert [name for name, count in Counter(classes).items() if count > 1] == []


def test_files_are_short_enough_to_read() -> None:
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 500, path


def test_the_stops_in_the_design_document_exist() -> None:
    """Every FILE:NAME of docs/design.md is a name in that file, and no way has more than ten stops."""
    text = (ROOT / "docs" / "design.md").read_text()
    for path, name in re.findall(r"`(tostlm/[\w/]+\.py)(?::(\w+))?`", text):
        tree = ast.parse((ROOT / path).read_text())
        assert not name or name in {getattr(node, "name", None) for node in tree.body}, f"{path}:{name}"
    ways = [section for section in text.split("\n## ") if section.startswith("The way of")]
    assert len(ways) == 3
    assert all(3 <= len(re.findall(r"^\d+\. ", way, re.MULTILINE)) <= 10 for way in ways)
