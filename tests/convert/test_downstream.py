"""What downstream users do with an export: fine-tune it, adapt it, spread it over devices, read its card."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import convert, write_hf

TRAINER = """
import sys, torch, transformers
folder, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
if out.endswith("lora"):
    import peft
    config = peft.LoraConfig(r=4, target_modules=["in_proj", "out_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
rows = [{"input_ids": row, "labels": row} for row in torch.arange(3, 67).repeat(8, 1)]
arguments = transformers.TrainingArguments(
    out + "-run", max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2,
    report_to=[], save_strategy="no", logging_steps=1, use_cpu=True, gradient_checkpointing=True)
trainer = transformers.Trainer(model, arguments, train_dataset=rows)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
assert losses[-1] < losses[0] - 0.1, losses
model.eval()
tokens = torch.arange(3, 43)[None]
if out.endswith("lora"):
    model.save_pretrained(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    again = peft.PeftModel.from_pretrained(again, out).merge_and_unload()
else:
    model.save_pretrained(out)
    again = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
torch.testing.assert_close(again.eval()(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-4)
"""


@pytest.fixture(scope="module")
def exported(trained: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downstream") / "hf"
    convert(load_checkpoint(trained["tssa"].dir), folder, write_hf)
    return folder


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_transformers_trains_it_on(exported: Path, tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, str(exported), str(tmp_path / kind)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_a_device_map_spreads_it(exported: Path, tmp_path: Path) -> None:
    tokens = torch.arange(3, 43)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    whole = load(exported, trust_remote_code=True)
    expected = whole(tokens).logits
    places = {f"lm.{name}": "disk" if name == "blocks" else "cpu" for name, _ in whole.lm.named_children()}
    for spread in ("auto", places):
        model = load(exported, trust_remote_code=True, device_map=spread, offload_folder=str(tmp_path))
        torch.testing.assert_close(model(tokens).logits, expected)
        assert model.generate(tokens, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 43)


@torch.no_grad()
def test_torch_compiles_it(exported: Path) -> None:
    tokens = torch.arange(3, 43)[None]
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model)(tokens).logits
    torch.testing.assert_close(compiled, model(tokens).logits, rtol=1e-3, atol=1e-4)


def test_the_card_says_what_it_is(trained: dict[str, Run], exported: Path, tmp_path: Path) -> None:
    run = trained["tssa"].dir
    succeed(tostlm("eval", "perplexity", str(run), "--contexts", "8,32"))
    succeed(tostlm("convert", str(run), "--to", "hf", str(tmp_path / "hf"), "--license", "apache-2.0"))
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for expected in (
        f"hf upload USER/{run.name} .",
        "trust_remote_code=True",
        "| Training tokens |",
        "## Loss by context",
    ):
        assert expected in card
    assert (tmp_path / "hf" / "report-context.png").stat().st_size > 1000
    assert "license: unknown" in (exported / "README.md").read_text()
    bad = tostlm("convert", str(run), "--to", "hf", str(tmp_path / "x"), "--license", "a: b")
    fail(bad, "--license 'a: b' must be an identifier")


@pytest.mark.slow
def test_int8_loads_where_torchao_is(trained: dict[str, Run], data: Path, tmp_path: Path) -> None:
    """In an environment of its own: torchao changes what transformers imports."""
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), "torchao"], check=True)
    script = f"import sys; sys.path.append({str(tmp_path / 'site')!r}); from tostlm.main import main; main()"
    for mixer, run in trained.items():
        command = [sys.executable, "-c", script, "convert", str(run.dir), "--to", "int8", str(tmp_path / mixer)]
        done = subprocess.run([*command, "--data", str(data)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert "held-out tokens of" in done.stdout and " in int8 (" in done.stdout
        exact = tmp_path / f"{mixer}, exact"
        convert(load_checkpoint(run.dir), exact, write_hf)
        sizes = [(folder / "model.safetensors").stat().st_size for folder in (tmp_path / mixer, exact)]
        assert sizes[0] < 0.8 * sizes[1], mixer  # the embedding stays as it is
