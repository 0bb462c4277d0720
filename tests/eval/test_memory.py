"""Documents of any length are read in the same memory, where the model's state is constant."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Run, succeed
from tostlm.data import VALIDATION, PreparationSettings, Tokenizer, TokenSet, prepare

MEASURE = """
import resource, sys
from tostlm.main import main
try:
    main()
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


@pytest.mark.slow
def test_a_million_tokens_take_no_more_memory(data: Path, tmp_path: Path) -> None:
    """Wide enough that what is read at a time takes megabytes: little blocks kept between would divide the heap."""
    run = Run(tmp_path, data)
    succeed(
        run.train("model.width=128", "model.heads=4", "model.positions=null", "model.layers=[{mixer: gated_delta}]")
    )
    words = np.random.default_rng(0).integers(97, 123, (1_400_000, 4), dtype=np.uint8)
    text = " ".join(word.tobytes().decode() for word in words)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": "short"}) + "\n")
    settings = PreparationSettings(sources=(str(tmp_path / "long.jsonl"),), heldout_fraction=0.999)
    prepare(settings, Tokenizer.from_folder(data), tmp_path / "data")
    assert len(TokenSet(tmp_path / "data", VALIDATION)) > 1 << 20

    def peak(context: str) -> int:
        """Return the peak of memory in MB of reading a document up to a context."""
        options = ["--data", str(tmp_path / "data"), "--contexts", context, "--out", str(tmp_path / context)]
        command = ["eval", "perplexity", str(run.dir), "--protocol", "stream", *options]
        done = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=True)
        assert json.loads((tmp_path / context / "perplexity.json").read_text())["models"][0]["scores"]
        return int(done.stderr.splitlines()[-1]) // 1024

    assert peak("1M") - peak("64k") < 50
