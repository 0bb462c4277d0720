"""DeepSpeed's checkpoints: others' are read at every stage, and others' engines go on from what is written."""

import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import transformers
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from tests.conftest import Run, fail, succeed, tostlm
from tests.processes import on_ranks
from tostlm.checkpoint import load_checkpoint
from tostlm.checkpoint.layout import read_kind

TOKENS = torch.randint(500, (2, 16), generator=torch.Generator().manual_seed(1))
STATE = {"fp32": "weight", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}


def adam_of(model: Any) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1 and p.requires_grad]
    return torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}], lr=1e-2, weight_decay=0.1)


def engine_of(export: Path, stage: int, bf16: bool = False, **settings: Any) -> Any:
    """An engine of DeepSpeed around an exported model, as a script that knows nothing of tostlm makes one."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    model.lm.norm.weight.requires_grad_(not bf16)
    adam = adam_of(model)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": bf16},
        "gradient_clipping": 0.0,
        **settings,
    }
    return deepspeed.initialize(model=model, optimizer=adam, config=config)[0]


def step(engine: Any) -> None:
    engine.backward(engine(input_ids=TOKENS, labels=TOKENS).loss)
    engine.step()


def whole(parameter: Any, kind: str) -> Tensor:
    read = partial(safe_get_full_optimizer_state, optim_state_key=kind)
    found: Tensor = safe_get_full_fp32_param(parameter) if kind == "fp32" else read(parameter)
    return found.clone()


def save_at_stages(export: Path, folder: Path, rank: int, world_size: int) -> dict[str, dict[str, Tensor]]:
    """The weights of engines that took two steps, and were saved to folders named as they are."""
    found = {}
    for stage, bf16 in ((0, False), (1, True), (2, False), (3, False)):
        engine = engine_of(export, stage, bf16)
        step(engine)
        step(engine)
        engine.save_checkpoint(str(folder / str(stage)))
        own = {
            name: whole(p, "fp32") if stage and p.requires_grad else p.detach().float()
            for name, p in engine.module.named_parameters()
        }
        found[str(stage)] = own
        engine.destroy()
    return found


def load_universal(folder: Path, rank: int, world_size: int) -> dict[int, dict[str, dict[str, Tensor]]]:
    """The state of engines that have loaded a universal checkpoint, and after one step more."""
    found = {}
    for stage in (1, 2):
        engine = engine_of(folder, stage, checkpoint={"load_universal": True})
        path, _ = engine.load_checkpoint(str(folder), load_lr_scheduler_states=False)
        assert path is not None and engine.global_steps == 6
        state = {kind: {name: whole(p, kind) for name, p in engine.module.named_parameters()} for kind in STATE}
        step(engine)
        state["after"] = {name: whole(p, "fp32") for name, p in engine.module.named_parameters()}
        found[stage] = state
        engine.destroy()
    return found


def test_checkpoints_of_every_stage_are_read(trained: dict[str, Run], tmp_path: Path) -> None:
    export = tmp_path / "hf"
    succeed(tostlm("convert", str(trained["tssa"].dir), "--to", "hf", str(export)))
    saved = on_ranks(2, partial(save_at_stages, export, tmp_path), tmp_path / "ranks")[0]
    for stage, expected in saved.items():
        source = tmp_path / stage
        fail(
            tostlm("checkpoint", "show", str(source)),
            "without its model's shape; put the config.json of what was trained",
        )
        for name in ("config.json", "tokenizer.json"):
            shutil.copy(export / name, source)
        weights = load_checkpoint(source).lm.state_dict()
        assert {f"lm.{name}" for name in weights} == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[f"lm.{name}"]), (stage, name)
    assert "the same" in succeed(tostlm("convert", str(tmp_path / "3"), "--to", "tostlm", str(tmp_path / "own")))

    # A run's own class has its names without what the export puts before them.
    with_config = tmp_path / "0"
    (with_config / "config.json").unlink()
    (with_config / "config.yaml").write_text(trained["tssa"].file.read_text())
    states = with_config / "global_step2" / "mp_rank_00_model_states.pt"
    content = torch.load(states)
    content["module"] = {name.removeprefix("lm."): tensor for name, tensor in content["module"].items()}
    torch.save(content, states)
    for name, weight in load_checkpoint(with_config).lm.state_dict().items():
        assert torch.equal(weight, saved["0"][f"lm.{name}"]), name

    rank = tmp_path / "2" / "global_step2" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    rank.unlink()
    shutil.copytree(tmp_path / "2", tmp_path / "without")
    next((tmp_path / "without" / "global_step2").glob("*_optim_states.pt")).unlink()
    fail(tostlm("checkpoint", "show", str(tmp_path / "without")), "has no optim_states.pt")
    fail(
        tostlm("checkpoint", "show", str(tmp_path / "2")),
        "cannot be put together",
        "is a rank's file missing, or was it",
    )
    other = next(rank.parent.glob("*_optim_states.pt"))
    content = torch.load(other, weights_only=False)
    torch.save(content, other, _use_new_zipfile_serialization=False)
    fail(tostlm("checkpoint", "show", str(tmp_path / "2")), f"{other} is in torch's format before 1.6, which DeepSpeed")
    torch.save([], other)
    fail(tostlm("checkpoint", "show", str(tmp_path / "2")), f"{other} holds a list and no records by name")
    torch.save(content, other)
    rank.with_name("mp_rank_01_model_states.pt").touch()
    fail(tostlm("checkpoint", "show", str(tmp_path / "2")), "has parts of a model in mp_rank_01_model_states.pt")
    executed = tmp_path / "executed"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (executed,)

    for file in (tmp_path / "1" / "global_step2").glob("*_optim_states.pt"):
        torch.save({"optimizer_state_dict": Code()}, file)
    fail(tostlm("checkpoint", "show", str(tmp_path / "1")), "holds more than tensors", "nothing in it was executed")

    patterns = tmp_path / "1" / "global_step[2]"  # DeepSpeed would find the files of global_step2
    patterns.mkdir()
    for file in (tmp_path / "2" / "global_step2").glob("*00_optim_states.pt"):
        shutil.copy(file, patterns)
    torch.save({"module": {}}, patterns / "mp_rank_00_model_states.pt")
    torch.save(Code(), tmp_path / "1" / "global_step2" / "mp_rank_00_model_states.pt")
    (tmp_path / "1" / "latest").write_text(patterns.name)
    fail(tostlm("checkpoint", "show", str(tmp_path / "1")), "cannot be put together")
    assert not executed.exists()
    pickle.loads(pickle.dumps(Code()))
    assert executed.exists()  # it would have run
    (tmp_path / "1" / "latest").write_text("../2/global_step2")
    fail(
        tostlm("convert", str(tmp_path / "1"), "--to", "hf", str(tmp_path / "x")),
        "has none of model.safetensors",
        "its latest names no checkpoint",
    )


def test_engines_of_others_go_on_with_the_optimizers_state(trained: dict[str, Run], tmp_path: Path) -> None:
    source = trained["tssa"]
    said = succeed(tostlm("convert", str(source.dir), "--to", "deepspeed", str(tmp_path / "out")))
    assert "logits of whole documents: " in said and "load_checkpoint" in said
    checkpoint = load_checkpoint(source.dir)
    own = {kind: dict(read_kind(checkpoint.path, checkpoint.config, ours)) for kind, ours in STATE.items()}
    expected = one_step_of_adam(tmp_path / "out", own)
    for stage, state in on_ranks(2, partial(load_universal, tmp_path / "out"), tmp_path / "ranks")[0].items():
        for kind in STATE:
            for name, tensor in own[kind].items():
                assert torch.equal(state[kind][f"lm.{name}"], tensor), (stage, kind, name)
        for name, tensor in expected.items():
            torch.testing.assert_close(state["after"][name], tensor, rtol=1e-5, atol=1e-6)


def one_step_of_adam(export: Path, own: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """The weights after one step of torch's AdamW from a checkpoint's state, which six updates made."""
    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    named = dict(model.named_parameters())
    adam = adam_of(model)
    for name, parameter in named.items():
        assert torch.equal(parameter, own["fp32"][name.removeprefix("lm.")])
        kinds = {kind: own[kind][name.removeprefix("lm.")].clone() for kind in ("exp_avg", "exp_avg_sq")}
        adam.state[parameter] = {"step": torch.tensor(6.0), **kinds}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    adam.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def test_what_has_no_state_of_adamw(trained: dict[str, Run], run: Run, tmp_path: Path) -> None:
    succeed(tostlm("convert", str(trained["tssa"].dir), "--to", "tostlm", str(tmp_path / "own")))
    to = ("--to", "deepspeed", str(tmp_path / "out"))
    fail(tostlm("convert", str(tmp_path / "own"), *to), "has weights alone; convert it with --to hf")
    succeed(run.train("optimizer.name=muon", "train.steps=2"))
    fail(
        tostlm("convert", str(run.dir), *to), "was trained by muon, whose state a universal checkpoint has no place for"
    )
    newest = load_checkpoint(trained["softmax"].dir).path
    copy = tmp_path / newest.name
    shutil.copytree(newest, copy)
    file = next((copy / "state").iterdir())
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    fail(tostlm("convert", str(copy), *to), "is damaged")
    assert not (tmp_path / "out").exists()
    assert json.loads((copy / "train_state.json").read_text())["step"] == 6
