"""The scripts of slurm/, for people who call sbatch themselves."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, tostlm
from tests.slurm.cluster import unavailable_reason
from tostlm.slurm.script import Resources, batch_script

pytestmark = pytest.mark.timed  # one of them may install shellcheck

SCRIPTS = sorted((ROOT / "slurm").glob("*.sbatch"))
COMMANDS = {
    "prepare": "tostlm prepare",
    "pretrain": "tostlm submit job",
    "eval": "tostlm eval perplexity",
    "bench": "tostlm bench train",
    "convert": "tostlm convert",
}


def test_every_submitted_subcommand_has_a_script() -> None:
    assert {path.stem for path in SCRIPTS} == COMMANDS.keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_its_command_with_all_arguments(path: Path) -> None:
    text = path.read_text()
    last = text.splitlines()[-1]
    assert last.startswith(f'exec {COMMANDS[path.stem]} "$@"')
    assert tostlm(*COMMANDS[path.stem].split()[1:], "--help").returncode == 0
    assert '. "${TOSTLM_SITE:-slurm/site.env}"' in text
    assert "#SBATCH --open-mode=append" in text and "#SBATCH --requeue" in text
    assert not re.search(r"(^|[ =\"])/(?!usr/bin/env)\w", text.replace("#!/", "")), "an absolute path"


def test_scripts_pass_shellcheck() -> None:
    if reason := unavailable_reason():
        pytest.skip(reason)
    made = batch_script("x", "x", ROOT / "slurm", Resources(nodes="1-4", ranks_per_node=8), ["tostlm x"])
    files = [*SCRIPTS, ROOT / "slurm" / "site.env", *(ROOT / "tests" / "slurm").glob("*.sh")]
    checks = [(["--shell=bash", "-x", *map(str, files)], None), (["--shell=bash", "-x", "-"], made)]
    for arguments, text in checks:
        done = subprocess.run(["shellcheck", *arguments], input=text, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
