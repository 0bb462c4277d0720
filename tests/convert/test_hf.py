"""Exports compute the same logits with transformers alone, and nothing else is published."""

import dataclasses
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tests.data.tokenizers import tokenizer_kinds
from tests.model.common import SOFTMAX, TSSA
from tostlm.checkpoint import Checkpoint, load_checkpoint
from tostlm.convert import convert, hf, write_hf
from tostlm.data import Tokenizer, import_tokenizer
from tostlm.errors import UserError
from tostlm.eval.generate import prompt_tokens
from tostlm.eval.sampling import Sampling
from tostlm.eval.writer import Writer
from tostlm.model import MIXERS, create_lm
from tostlm.model.mixers.tssa_cross import TSSACrossOptions

# What a downstream user runs; tostlm cannot be imported there.
DOWNSTREAM = """
import json, sys, torch, transformers
assert "tostlm" not in sys.modules
folder, tokens = sys.argv[1], json.loads(sys.argv[2])
model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("Fellow citizens of the", return_tensors="pt")
with torch.no_grad():
    logits = model(torch.tensor([tokens])).logits[0, -1].tolist()
runs = {name: model.generate(**inputs, max_new_tokens=12, do_sample=False, **options).tolist()[0] for name, options in
        dict(cached={}, again={"use_cache": False}, beams={"num_beams": 3}).items()}
print(json.dumps({"class": type(model).__name__, "logits": logits, "ids": inputs["input_ids"][0].tolist(), **runs}))
"""


# All that transformers offers without other packages: in an environment that has none.
EVERYTHING = """
import sys, tempfile, torch, transformers
folder = sys.argv[1]
def load(path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, **options)
model = load(folder).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
prompts = ["Fellow citizens of the", "We", "It is the duty of every"]
tokenizer.padding_side = "left"
batch = tokenizer(prompts, return_tensors="pt", padding=True)
options = dict(max_new_tokens=6, min_new_tokens=6)
for how in (dict(do_sample=False), dict(do_sample=False, num_beams=3), dict(do_sample=False, use_cache=False)):
    together = model.generate(**batch, **options, **how)[:, batch["input_ids"].shape[1] :]
    for row, prompt in zip(together, prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        written = model.generate(**alone, **options, **how)[0, alone["input_ids"].shape[1] :]
        assert torch.equal(written, row), (how, prompt)
sampled = model.generate(**batch, **options, do_sample=True, top_p=0.9, num_return_sequences=2)
assert sampled.shape[0] == 6
class Words(transformers.generation.streamers.BaseStreamer):
    count = 0
    def put(self, value): self.count += 1
    def end(self): self.ended = True
streamer = Words()
model.generate(**tokenizer("We", return_tensors="pt"), **options, do_sample=False, streamer=streamer)
assert streamer.count == 7 and streamer.ended
writer = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
assert len(writer(prompts, batch_size=3, max_new_tokens=4)) == 3
tokens = torch.arange(3, 35).repeat(2, 1)
cache = model(tokens[:, :20], use_cache=True).past_key_values
after = model(tokens[:, 20:], past_key_values=cache).logits
torch.testing.assert_close(after, model(tokens).logits[:, 20:], rtol=1e-3, atol=1e-4)
model.train()
model.gradient_checkpointing_enable()
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
losses = []
for _ in range(5):
    losses.append(model(tokens, labels=tokens).loss)
    losses[-1].backward()
    optimizer.step()
    optimizer.zero_grad()
assert losses[-1] < losses[0] - 0.1, losses
model.gradient_checkpointing_disable()
model.eval()
with tempfile.TemporaryDirectory() as again, torch.no_grad():
    model.save_pretrained(again)
    assert torch.equal(load(again).eval()(tokens).logits, model(tokens).logits)
    narrow = load(again, dtype=torch.bfloat16).eval()(tokens).logits
    assert narrow.dtype == torch.bfloat16 and (narrow - model(tokens).logits).abs().max() < 0.5
    compiled = torch.compile(model)(tokens).logits
    torch.testing.assert_close(compiled, model(tokens).logits, rtol=1e-3, atol=1e-4)
print("everything")
"""


@pytest.fixture(scope="module")
def exported(trained: dict[str, Run], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {mixer: tmp_path_factory.mktemp("hf") / mixer for mixer in trained}
    for mixer, folder in folders.items():
        succeed(tostlm("convert", str(trained[mixer].dir), "--to", "hf", str(folder)))
    return folders


def downstream(python: str, folder: Path, tokens: list[int], cache: Path) -> dict[str, Any]:
    """Run DOWNSTREAM outside of this repository, without tostlm, sentencepiece and jaxtyping."""
    blocked = (
        "import sys; sys.modules['tostlm'] = None; sys.modules['sentencepiece'] = None; del sys.modules['tostlm']\n"
    )
    guard = (
        "class No:\n  def find_spec(self, name, *_):\n"
        "    if name.split('.')[0] in ('tostlm', 'jaxtyping'): raise ImportError(name)\n"
    )
    code = blocked + guard + "sys.meta_path.insert(0, No())\n" + DOWNSTREAM
    result = subprocess.run(
        [python, "-c", code, str(folder), json.dumps(tokens)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def assert_same_model(found: dict[str, Any], checkpoint: Checkpoint, tokens: list[int]) -> None:
    logits = checkpoint.lm(torch.tensor([tokens]))[0][0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, rtol=1e-3, atol=1e-4)
    tokenizer = checkpoint.tokenizer
    assert found["ids"] == prompt_tokens(tokenizer, "Fellow citizens of the")
    assert found["cached"] == found["again"]
    writer = Writer(checkpoint.lm, tokenizer.vocab_size, Sampling(temperature=0), [0])
    writer.read(torch.tensor([found["ids"]]))
    written = found["cached"][len(found["ids"]) :]
    assert written == [int(writer.write()[0]) for _ in written]
    assert len(found["beams"]) > len(found["ids"])


@pytest.mark.parametrize(("mixer", "kind"), [("tssa", "TostForCausalLM"), ("softmax", "GPT2LMHeadModel")])
def test_transformers_alone_computes_the_same(
    trained: dict[str, Run], exported: dict[str, Path], tmp_path: Path, mixer: str, kind: str
) -> None:
    checkpoint, tokens = load_checkpoint(trained[mixer].dir), list(range(3, 53))
    found = downstream(sys.executable, exported[mixer], tokens, tmp_path)
    assert found["class"] == kind
    assert_same_model(found, checkpoint, tokens)


@pytest.mark.slow
def test_in_an_environment_with_torch_and_transformers_alone(
    trained: dict[str, Run], exported: dict[str, Path], tmp_path: Path
) -> None:
    venv.create(tmp_path / "clean", with_pip=True)
    python = str(tmp_path / "clean" / "bin" / "python")
    constraints = str(ROOT / "constraints.txt")
    subprocess.run([python, "-m", "pip", "install", "-q", "-c", constraints, "torch", "transformers"], check=True)
    installed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert not {"tostlm", "sentencepiece", "deepspeed"} & set(installed.split())
    for mixer, folder in exported.items():
        tokens = list(range(3, 53))
        assert_same_model(downstream(python, folder, tokens, tmp_path), load_checkpoint(trained[mixer].dir), tokens)
        alone = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        command = [python, "-c", EVERYTHING, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=alone)
        assert done.stdout.endswith("everything\n"), done.stderr


def test_generation_runs_on_a_state_of_constant_size(exported: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["tssa"], trust_remote_code=True)
    read = []
    forward = model.lm.hidden

    def watch(tokens: torch.Tensor, *rest: object, **options: object) -> object:
        read.append(tokens.shape[1])
        return forward(tokens, *rest, **options)

    model.lm.hidden = watch
    output = model.generate(
        torch.arange(3, 33)[None], max_new_tokens=20, min_new_tokens=20, do_sample=False, return_dict_in_generate=True
    )
    assert read == [30] + [1] * 19
    assert output.past_key_values.nbytes == 2 * (2 * 32 + 2) * 8


def test_labels_are_shifted_as_usual(exported: dict[str, Path]) -> None:
    for folder in exported.values():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        tokens = torch.arange(3, 53)[None]
        output = model(tokens, labels=tokens)
        expected = torch.nn.functional.cross_entropy(output.logits[0, :-1], tokens[0, 1:])
        torch.testing.assert_close(output.loss, expected)


def test_a_trainer_divides_the_loss_by_its_accumulation_steps(exported: dict[str, Path]) -> None:
    """transformers.Trainer asks the model; where it is not told, it takes `**kwargs` for a loss summed over a batch."""
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["tssa"], trust_remote_code=True)
    assert model.accepts_loss_kwargs is False


def test_a_pipeline_takes_batches(exported: dict[str, Path]) -> None:
    prompts = ["Fellow citizens of the", "We", "It is the duty of every"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    for folder in exported.values():
        writer = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
        writer.tokenizer.pad_token_id, writer.tokenizer.padding_side = writer.tokenizer.eos_token_id, "left"
        alone = [writer(prompt, **options)[0]["generated_text"] for prompt in prompts]
        together = [found[0]["generated_text"] for found in writer(prompts, batch_size=3, **options)]
        assert together == alone


def test_the_exported_tokenizer_gives_the_same_ids(
    exported: dict[str, Path], tokenizer: Tokenizer, speeches: list[str]
) -> None:
    fast = transformers.AutoTokenizer.from_pretrained(exported["softmax"])
    for text in [*speeches, "\u2581 \u2581\u2581x", "  a\n\n\tb  ", "\u6f22\u5b57 \U0001f642", "<unk>", "<0x0A>"]:
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert fast.decode(ids) == text


@pytest.mark.parametrize("kind", ["mistral", "gpt2", "byte-level", "metaspace"])
def test_tokenizers_made_elsewhere_are_exported(
    trained: dict[str, Run], speeches: list[str], tmp_path: Path, kind: str
) -> None:
    content = {
        "mistral": lambda: tokenizer_kinds.mistral_like(speeches),
        "gpt2": lambda: tokenizer_kinds.ranks_file(tokenizer_kinds.gpt2_ranks()),
        "byte-level": lambda: tokenizer_kinds.byte_level(speeches, ["<s>", "</s>"]).to_str().encode(),
        "metaspace": lambda: tokenizer_kinds.metaspace(speeches).to_str().encode(),
    }[kind]()
    (tmp_path / "source").write_bytes(content)
    tokenizer = import_tokenizer(tmp_path / "source")
    checkpoint = load_checkpoint(trained["tssa"].dir)
    shape = dataclasses.replace(checkpoint.config.model, vocab_size=tokenizer.vocab_size)
    convert(checkpoint._replace(lm=create_lm(shape, 0).eval(), tokenizer=tokenizer), tmp_path / "hf", write_hf)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert fast.eos_token_id == fast.bos_token_id == tokenizer.eos_id
    assert fast("")["input_ids"] == [tokenizer.eos_id]
    texts = [
        *speeches,
        "  a\n\n\tb  ",
        " x",
        "\u6f22\u5b57 \U0001f642",
        *([] if kind == "metaspace" else ["\u2581 \u2581x"]),
    ]
    for text in texts:
        ids = fast(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode(text)
        assert fast.decode(ids) == text
        assert fast(text)["input_ids"] == [tokenizer.eos_id, *ids]  # as `tostlm generate` begins


def test_the_tokenizer_is_named_in_the_config(exported: dict[str, Path], tokenizer: Tokenizer) -> None:
    for folder in exported.values():
        assert json.loads((folder / "config.json").read_text())["tokenizer_sha256"] == tokenizer.sha256
        assert transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True).vocab_size == 512


def test_every_parameter_of_gpt2_is_carried_over(trained: dict[str, Run], exported: dict[str, Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(exported["softmax"])
    block = load_checkpoint(trained["softmax"].dir).lm.blocks[1]
    expected = block.scale_mlp[:, None] * block.mlp.out_proj.weight
    torch.testing.assert_close(model.transformer.h[1].mlp.c_proj.weight.t(), expected)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    ("switches", "kind"),
    [
        ({"mlp": "relu2", "mlp_width": 80, "layer_scale": None, "output_init": "zero"}, "GPT2LMHeadModel"),
        ({"bias": True}, "GPT2LMHeadModel"),
        ({"norm": "rmsnorm"}, "TostForCausalLM"),
        ({"embed_norm": True}, "TostForCausalLM"),
        ({"tie_embeddings": False, "z_loss": 1e-4}, "GPT2LMHeadModel"),
        ({"logit_softcap": 0.1}, "TostForCausalLM"),
        ({"value_residual": True}, "TostForCausalLM"),
        ({"embed_skip": True}, "TostForCausalLM"),
        ({"mlp": "swiglu"}, "TostForCausalLM"),
        ({"layers": (TSSACrossOptions(),), "positions": None, "norm": "rmsnorm", "mlp": "swiglu"}, "TostForCausalLM"),
    ],
    ids=str,
)
def test_a_model_is_gpt2_where_gpt2s_class_can_hold_it(
    trained: dict[str, Run], tmp_path: Path, switches: dict[str, Any], kind: str
) -> None:
    """The export itself compares the logits."""
    checkpoint = load_checkpoint(trained["softmax"].dir)
    lm = create_lm(dataclasses.replace(checkpoint.config.model, **switches), 0).eval()
    for parameter in lm.requires_grad_(False).parameters():  # what starts at zero matters too
        parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    convert(checkpoint._replace(lm=lm), tmp_path / "hf", write_hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    assert type(model).__name__ == kind
    torch.testing.assert_close(model(torch.arange(3, 53)[None]).logits, lm(torch.arange(3, 53)[None])[0])


def test_every_mixer_is_exported(trained: dict[str, Run], tmp_path: Path) -> None:
    """The export itself compares the logits, of all tokens at once and step by step. Folders may have any name."""
    folder = tmp_path / "optimizer.lr=0.001 (é)"
    checkpoint = load_checkpoint(trained["softmax"].dir)
    layers = tuple(mixer.options_class() for _, mixer in sorted(MIXERS.items()))
    shape = dataclasses.replace(checkpoint.config.model, layers=layers, depth=len(layers), layer_scale=0.1)
    lm = create_lm(shape, 0).eval()
    convert(checkpoint._replace(lm=lm), folder, write_hf)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert [block.mixer.options.mixer for block in model.lm.blocks] == sorted(MIXERS)


def test_hybrids_and_bf16(trained: dict[str, Run], exported: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained["tssa"].dir)
    shape = dataclasses.replace(checkpoint.config.model, layers=TSSA + SOFTMAX, positions=64)
    lm = create_lm(shape, 0).to(torch.bfloat16).eval()
    convert(checkpoint._replace(lm=lm), tmp_path / "hybrid", write_hf)
    transformers.AutoModelForCausalLM.from_pretrained(exported["tssa"], trust_remote_code=True)  # other mixers' files
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", trust_remote_code=True, dtype="auto")
    tokens = torch.arange(3, 53)[None]
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(model(tokens).logits, lm(tokens)[0])
    gpt2 = load_checkpoint(trained["softmax"].dir)
    convert(gpt2._replace(lm=gpt2.lm.to(torch.bfloat16)), tmp_path / "gpt2", write_hf)


def test_a_wrong_export_is_not_published(
    trained: dict[str, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect = hf.source_logits

    def of_another_model(checkpoint: Checkpoint, tokens: torch.Tensor) -> torch.Tensor:
        return expect(checkpoint._replace(lm=create_lm(checkpoint.config.model, seed=99)), tokens)

    monkeypatch.setattr(hf, "source_logits", of_another_model)
    for mixer in ("tssa", "softmax"):
        with pytest.raises(UserError, match=r"differ from the source's by .* nothing was published"):
            convert(load_checkpoint(trained[mixer].dir), tmp_path / "out", write_hf)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_no_bpe_is_not_exported(
    trained: dict[str, Run], speeches: list[str], tmp_path: Path
) -> None:
    unigram = tokenizer_kinds.sentencepiece_model(
        speeches,
        vocab_size=500,
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    checkpoint = load_checkpoint(trained["tssa"].dir)
    with pytest.raises(UserError, match="only BPE tokenizers"):
        convert(checkpoint._replace(tokenizer=Tokenizer.from_bytes(unigram)), tmp_path / "out", write_hf)
    assert not (tmp_path / "out").exists()


def test_an_export_leaves_its_neighbours_alone(trained: dict[str, Run], tmp_path: Path) -> None:
    (tmp_path / "hf_partial").mkdir()
    convert(load_checkpoint(trained["tssa"].dir), tmp_path / "hf", write_hf)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "hf_partial"}


def test_mistakes(trained: dict[str, Run], exported: dict[str, Path], tmp_path: Path) -> None:
    run = str(trained["tssa"].dir)
    fail(tostlm("convert", run, "--to", "hf", str(exported["tssa"])), "exists; remove it or choose another folder")
    fail(tostlm("convert", run, "--to", "gguf", str(tmp_path / "x")), "--to gguf is not known; use hf, tostlm, release")
    fail(tostlm("convert", str(tmp_path), "--to", "hf", str(tmp_path / "x")), "neither a checkpoint nor")
    fail(tostlm("convert", run, "--to", "hf", "/proc/x"), "cannot write in /proc")
