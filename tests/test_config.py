"""Configs are strict, and every mistake is one line with the way out."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import yaml

from tests.conftest import ROOT, Run, fail, succeed, tostlm
from tostlm.config import RunConfig, batch_plan, dump_config, fixed_values, load_config
from tostlm.config.sections import OnResume, Section
from tostlm.errors import UserError
from tostlm.model import MIXERS, count_parameters
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa import TSSAOptions
from tostlm.train.engine import deepspeed_dict

NAMES = ", ".join(sorted(MIXERS))
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SIZES = {  # millions of parameters without position embeddings
    "tost-base": 110,
    "tost-medium": 304,
    "tost-large": 655,
    "gpt2-base": 124,
    "gpt2-medium": 354,
    "gpt2-large": 772,
    "gpt2-authors-base": 124,
    "gpt2-authors-medium": 354,
    "gpt2-authors-large": 772,
    **dict.fromkeys(("tost-long-base", "tost-hybrid-base"), 124.4),
    **dict.fromkeys(("tost-long-medium", "tost-hybrid-medium"), 354.6),
    **dict.fromkeys(("tost-long-large", "tost-hybrid-large"), 774.5),
    "quickstart": 1.32,
    "quickstart-gpt2": 1.32,
}

TINY = "depth: 1, width: 8, heads: 1, vocab_size: 512, positions: null, layers: [{mixer: conv}]"


def blend(sets: str) -> str:
    return f"data={{context_tokens: 64, blend: [{sets}]}}"


def curriculum(*stages: tuple[int, int]) -> str:
    listed = ", ".join(f"{{until_step: {step}, context_tokens: {context}}}" for step, context in stages)
    return f"data.curriculum=[{listed}]"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_builds(path: Path) -> None:
    config = load_config(path)
    assert count_parameters(config.model) / 1e6 == pytest.approx(SIZES[path.stem], rel=0.005)
    deepspeed_dict(config, batch_plan(config, 2 if "quickstart" in path.stem else 8))


@pytest.mark.parametrize("size", ["base", "medium", "large"])
def test_the_authors_recipe(size: str) -> None:
    tost, theirs, gpt2 = (
        load_config(ROOT / "configs" / f"{kind}-{size}.yaml") for kind in ("tost", "gpt2-authors", "gpt2")
    )
    assert tost.train == theirs.train == gpt2.train
    assert tost.optimizer == theirs.optimizer == gpt2.optimizer
    assert dataclasses.replace(theirs.model, layers=tost.model.layers) == tost.model
    assert (gpt2.model.bias, gpt2.model.layer_scale) == (True, None)
    assert (tost.train.batch_tokens, tost.train.steps, tost.tokens) == (491_520, 600_000, 294_912_000_000)
    optimizer = tost.optimizer
    assert (optimizer.lr, optimizer.min_lr, optimizer.warmup_steps, optimizer.betas) == (6e-4, 6e-5, 2000, (0.9, 0.95))
    assert optimizer.weight_decay == (1e-2 if size == "base" else 1e-1)
    assert tost.deepspeed["gradient_clipping"] == 1.0
    assert tost.data.context_tokens == tost.model.positions == 1024


@pytest.mark.parametrize("kind", ["long", "hybrid"])
@pytest.mark.parametrize("size", ["base", "medium", "large"])
def test_models_that_read_their_context_have_gpt2s_size(kind: str, size: str) -> None:
    config, gpt2 = (load_config(ROOT / "configs" / f"{name}-{size}.yaml") for name in (f"tost-{kind}", "gpt2"))
    assert count_parameters(config.model) == pytest.approx(count_parameters(gpt2.model), rel=0.01)
    assert (config.model.depth, config.model.width) == (gpt2.model.depth, gpt2.model.width)
    assert config.train.batch_tokens == gpt2.train.batch_tokens
    growing = [options.mixer for options in config.model.layer_plan if not MIXERS[options.mixer].constant_state]
    assert len(growing) == (0 if kind == "long" else config.model.depth // 4)


def test_dump_reads_back(run: Run, tmp_path: Path) -> None:
    config = run.config(
        "optimizer.lr=3e-3",
        "model.depth=5",
        blend("{path: a, weight: 3}, {path: b, weight: 0.1}"),
        curriculum((2, 32)),
    )
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config
    assert (config.optimizer.lr, config.model.depth) == (3e-3, 5)


def test_an_override_is_not_cut_at_a_comment(run: Run) -> None:
    assert run.config("run_dir=runs/a #1").run_dir == Path("runs/a #1")
    assert run.config('run_dir="runs/a #1"').run_dir == Path("runs/a #1")
    assert run.config('train.wandb_project=""').train.wandb_project == ""


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("1.5E-3", 1.5e-3), (".5", 0.5), ("5", 5.0), ("1_0.5", 10.5), ("0", 0.0)]
)
def test_numbers(run: Run, text: str, value: float) -> None:
    assert run.config(f"optimizer.weight_decay={text}").optimizer.weight_decay == value


def test_overrides_make_missing_parents(run: Run) -> None:
    assert run.config("deepspeed.bf16.enabled=true").deepspeed["bf16"] == {"enabled": True}


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.widht=3", "model.widht is an unknown key; the nearest is model.width"),
        ("model.recip=modern", "model.recip is an unknown key; the nearest is model.recipe"),
        ("model.recipe=modem", "model.recipe 'modem' is not known; use paper or modern"),
        ("model.value_residual=true", "model.value_residual: the first layer's mixer, tssa, has no values"),
        ("model.logit_softcap=0", "model: logit_softcap 0.0 must be positive"),
        ("model.z_loss=-1", "model: z_loss -1.0 must be 0 or more"),
        ("optimiser.lr=1", "optimiser is an unknown key; the nearest is optimizer"),
        ("data.context=1", "data.context is an unknown key; the nearest is data.context_tokens"),
        ("train.steps=010", "train.steps='010': input should be a valid integer"),
        ("train.steps=1:30", "train.steps='1:30': input should be a valid integer"),
        ("train.steps=0b11", "train.steps='0b11': input should be a valid integer"),
        ("optimizer.lr=1:30.5", "optimizer.lr='1:30.5': input should be a valid number"),
        ("train.steps=9999999999999999999", "train.steps=9999999999999999999"),
        ("optimizer.lr=1e39", "optimizer.lr=1e+39: input should be less than"),
        ("train.spike_window_steps=1000000000000", "train.spike_window_steps=1000000000000"),
        ("train.steps=" + "[" * 5000, "is not a YAML value"),
        (
            "deepspeed.zero_optimization.stage3_module_granularity_threshold=1000",
            "stage3_module_granularity_threshold=1000 breaks modules whose parameters",
        ),
        ("deepspeed.bf16.bf16_optimizer_states=true", "would round the optimizer's state, which checkpoints hold"),
        ("optimizer.lr=fast", "optimizer.lr='fast': input should be a valid number"),
        ("train.steps=true", "train.steps=True: input should be a valid integer"),
        ("train.steps=0", "train.steps=0: input should be greater than or equal to 1"),
        ("train.steps=null", "train.steps=None"),
        (
            "model.layers=[{mixer: sofmax}]",
            f"'sofmax' is not a mixer; use {NAMES}; the nearest is softmax",
        ),
        ("model.layers=[{mixr: tssa}]", f"model.layers.0.mixer is missing; name one of {NAMES}"),
        ("model.layers=[]", "model: layers is empty"),
        (
            "model.layers.0.halflife=3",
            "model.layers.0.halflife is an unknown key; the nearest is model.layers.halflife_tokens",
        ),
        ("model.layers.0.halflife_tokens=[0,5]", "model.layers.0: halflife_tokens [0.0, 5.0] must be positive"),
        ("model.layers.1.mixer=tssa", "override 'model.layers.1.mixer=tssa': 1 must be an index of a list of 1"),
        (f"model={{bias: true, norm: rmsnorm, {TINY}}}", "bias true goes with norm layernorm; rmsnorm has none"),
        (f"model={{bias: true, {TINY}}}", "model.bias: conv layers have no biases; set it to false"),
        ("model.heads=3", "model: width 32 does not divide into 3 heads"),
        ("train.batch_tokens=1000", "train.batch_tokens 1000 does not divide into contexts of 64 tokens; try 1024"),
        ("optimizer.schedule=wsd", "decay_steps goes with schedule wsd"),
        (
            "optimizer={schedule: wsd, decay_steps: 5, warmup_steps: 2, lr: 1e-3, min_lr: 0, weight_decay: 0}",
            "optimizer.decay_steps 5 begin after step 1, within optimizer.warmup_steps 2",
        ),
        ("optimizer.min_lr=1", "min_lr 1.0 is above lr"),
        ("optimizer.name=moun", "optimizer.name='moun'"),
        ("optimizer.muon.momentum=0.9", "the keys of optimizer.muon go with optimizer.name muon, and it is adamw"),
        ("optimizer.groups=[{match: emb, lr_scale: 2}, {match: embed, lr_scale: 3}]", "'embed' has no effect: every"),
        (
            "optimizer.groups=[{match: attn, lr_scale: 0}]",
            "match 'attn' has no effect: no parameter's name has it;",
        ),
        ("optimizer.groups=[{match: '('}]", "optimizer.groups.0.match: '(' is no regular expression: missing ),"),
        ("optimizer.groups=[{match: embed, lr_scale: -1}]", "optimizer.groups.0.lr_scale=-1"),
        ("optimizer.groups=[{match: embed}]", "optimizer.groups.0: match 'embed' has no effect: set lr_scale or"),
        ("optimizer.groups=[{match: 'e{99999999999}'}]", "'e{99999999999}' is no regular expression: the repetition"),
        ("optimizer.groups=[{lr_scale: 2}]", "optimizer.groups.0.match is missing"),
        ("optimizer.muon.momentum=1", "optimizer.muon.momentum=1"),
        ("optimizer.muon.newton_schulz_steps=0", "optimizer.muon.newton_schulz_steps=0"),
        ("deepspeed.train_batch_size=8", "deepspeed.train_batch_size is derived; set train.batch_tokens instead"),
        ("deepspeed.zero_optimisation=1", "deepspeed.zero_optimisation is an unknown key; the nearest is zero_opt"),
        ("model.positions=32", "data.context_tokens 64 is longer than model.positions 32"),
        ("optimizer.lr=.inf", "optimizer.lr"),
        ("model.layer_scale=.nan", "model.layer_scale"),
        ("model.mlp=relu", "model.mlp='relu': input should be 'gelu', 'gelu_tanh', 'relu2' or 'swiglu'"),
        ("model.norm=rms", "model.norm='rms': input should be 'layernorm' or 'rmsnorm'"),
        ("model.mlp_width=0", "model: mlp_width 0 must be from 1 to"),
        ("model.layers=[{mixer: softmax, short_conv: 9}]", "model.layers.0: short_conv 9 must be from 0 to 8 taps"),
        ("model.layers=[{mixer: tssa_cross, forgetting: slowly}]", "model.layers.0.forgetting='slowly'"),
        ("optimizer.betas=[1.5,2]", "optimizer.betas.0=1.5"),
        ("optimizer.betas=[0.9]", "optimizer.betas needs 2 values"),
        ("seed=-1", "seed=-1"),
        ("model.vocab_size=99999999999999", "model: vocab_size 99999999999999 must be from 1 to"),
        ("deepspeed.zero_optimization=2", "deepspeed.zero_optimization=2: Input should be a valid dictionary"),
        ("deepspeed.gradient_clipping=abc", "deepspeed.gradient_clipping='abc': Input should be a valid number"),
        ("deepspeed.zero_optimization.stage=7", "deepspeed.zero_optimization.stage=7 must be 0, 1, 2 or 3"),
        ("deepspeed.zero_optimization.stage=true", "deepspeed.zero_optimization.stage=True must be 0, 1, 2 or 3"),
        (
            "deepspeed.zero_optimization.stag=1",
            "deepspeed.zero_optimization.stag is an unknown key; the nearest is stage",
        ),
        (
            "deepspeed={bf16: {enabled: true}, fp16: {enabled: true}}",
            "bfloat16 and fp16 modes cannot be simultaneously",
        ),
        ("deepspeed.bf16.enabld=true", "deepspeed.bf16.enabld is an unknown key; the nearest is enabled"),
        ("deepspeed.fp16.loss_scale=a", "deepspeed.fp16.loss_scale='a'"),
        ("deepspeed.torch_autocast={enabled: true, dtype: int3}", "'int3' is not a valid DtypeEnum"),
        (
            "deepspeed.torch_autocast.enable=true",
            "deepspeed.torch_autocast.enable is an unknown key; the nearest is enabled",
        ),
        (
            "deepspeed.data_types.grad_accum_dtype=fp31",
            "deepspeed.data_types.grad_accum_dtype='fp31': Input should be 'fp32', 'bf16' or 'fp16'",
        ),
        ("deepspeed.data_types.param_dtype=bf16", "deepspeed.data_types.param_dtype is an unknown key"),
        ("deepspeed.flops_profiler.enabld=true", "deepspeed.flops_profiler.enabld is an unknown key; the nearest is"),
        ("deepspeed.tensorboard.path=x", "deepspeed.tensorboard.path is an unknown key"),
        (
            "deepspeed.wall_clock_breakdown=often",
            "deepspeed.wall_clock_breakdown='often': Input should be a valid bool",
        ),
        ("deepspeed.bf16.enabled=auto", "deepspeed.bf16.enabled='auto'"),
        ("deepspeed.bf16.enabled='false'", "deepspeed.bf16.enabled='false' must be true or false"),
        ("deepspeed.fp16.enabled=1", "deepspeed.fp16.enabled=1 must be true or false"),
        ("deepspeed.fp16.initial_scale_power='8'", "deepspeed.fp16.initial_scale_power='8' must be a number"),
        ("deepspeed.torch_autocast.enabled='false'", "deepspeed.torch_autocast.enabled='false': Input should be a"),
        ("deepspeed.torch_autocast.enabled=1", "deepspeed.torch_autocast.enabled=1: Input should be a valid bool"),
        ("deepspeed.csv_monitor.enabled='no'", "deepspeed.csv_monitor.enabled='no' must be true or false"),
        (
            "deepspeed.zero_optimization.reduce_bucket_size=auto",
            "deepspeed.zero_optimization.reduce_bucket_size='auto' must be a number; write one, or leave it out",
        ),
        (
            "deepspeed.zero_optimization.offload_optimizer={device: cpu, pin_memory: 'false'}",
            "deepspeed.zero_optimization.offload_optimizer.pin_memory='false' must be true or false",
        ),
        (
            "deepspeed.zero_optimization={stage: 1, allgather_bucket_size: 3}",
            "deepspeed.zero_optimization.allgather_bucket_size=3 must be even",
        ),
        (
            "deepspeed={prescale_gradients: true, zero_optimization: {stage: 2}}",
            "deepspeed.prescale_gradients=True does not go with ZeRO stage 2; leave it out, or set",
        ),
        (
            "deepspeed={gradient_predivide_factor: 2.0, zero_optimization: {stage: 3}}",
            "deepspeed.gradient_predivide_factor=2.0 does not go with ZeRO stage 3",
        ),
        (
            "deepspeed={bf16: {enabled: true}, data_types: {grad_accum_dtype: fp32}, zero_optimization: {stage: 0}}",
            "deepspeed.data_types.grad_accum_dtype=fp32 is not the bf16 of the weights, which ZeRO stage 0 needs",
        ),
        (
            "deepspeed.torch_autocast={enabled: true, lower_precision_safe_modules: [torch.nn.Linea]}",
            "lower_precision_safe_modules: 'torch.nn.Linea' is no class to import",
        ),
        ("deepspeed.flops_profiler.profile_step=abc", "deepspeed.flops_profiler.profile_step='abc': Input should be"),
        (
            "deepspeed.flops_profiler.output_file=5",
            "deepspeed.flops_profiler.output_file=5: Input should be a valid str",
        ),
        ("deepspeed.communication_data_type=int8", "deepspeed.communication_data_type='int8': Input should be 'fp32'"),
        ("deepspeed.gradient_allreduce_op=sum", "would make the gradient depend on the number of ranks; leave it out"),
        (
            "deepspeed.zero_optimization.round_robin_gradients=true",
            "round_robin_gradients=True would order the optimizer",
        ),
        (
            "deepspeed.zero_optimization.offload_optimizer.device=nvme",
            "offload_optimizer.device='nvme' keeps state where",
        ),
        (
            "deepspeed.zero_optimization.offload_param.ratio=0.5",
            "offload_param.ratio=0.5 keeps state where checkpoints",
        ),
        ("deepspeed.zero_optimization.cpu_offload=true", "is deprecated by DeepSpeed; set offload_optimizer"),
        ("deepspeed.zero_optimization.compute_grad_norm=false", "compute_grad_norm=False would hide gradients that"),
        ("optimizer.warmup_steps=7", "optimizer.warmup_steps 7 is above train.steps 6"),
        (
            "model.layers.0.halflife_tokens=[64,4]",
            "halflife_tokens [64.0, 4.0] must be positive, shortest first",
        ),
        ('run_dir="a\\nb"', r"run_dir: 'a\nb' has control characters, such as a line break; choose another name"),
        ("data.path=null", "data: set one of path, a prepared folder, and blend, a list of {path, weight}"),
        ("data.blend=[{path: a, weight: 1}]", "data: set one of path, a prepared folder, and blend"),
        (blend("{path: a}"), "data.blend.0.weight is missing; give it a value"),
        (blend("{path: a, weight: 0}"), "data.blend.0.weight=0: input should be greater than 0"),
        (blend("{path: a, weight: .inf}"), "data.blend.0.weight"),
        (blend("{path: a, wieght: 1}"), "data.blend.0.wieght is an unknown key; the nearest is data.blend.weight"),
        (blend("{path: a, weight: 1}, {path: a, weight: 2}"), "data: blend names a twice; add up its weights"),
        (curriculum((2, 64), (2, 64)), "data: curriculum until_step 2 must be above the 2 before it"),
        (curriculum((3, 32), (2, 64)), "data: curriculum until_step 2 must be above the 3 before it"),
        (curriculum((0, 32)), "data.curriculum.0.until_step=0: input should be greater than or equal to 1"),
        (curriculum((2, 128)), "curriculum context_tokens 128 is longer than data.context_tokens 64, the longest"),
        (curriculum((6, 32)), "data.curriculum until_step 6 must be below train.steps 6"),
        (
            "data.curriculum=[{until_step: 2, batch_tokens: 96}]",
            "curriculum batch_tokens 96 does not divide into contexts",
        ),
        (
            "data.curriculum=[{until_step: 2}]",
            "the stage until_step 2 has no effect: set context_tokens or batch_tokens",
        ),
        (curriculum((2, 48)), "train.batch_tokens 512 does not divide into contexts of 48 tokens; try 576"),
        ("data.curriculum=[{until: 2}]", "data.curriculum.0.until is an unknown key; the nearest is"),
        ("steps", "override 'steps' is not KEY=VALUE"),
        ("train.steps.x=3", "steps holds a value, not keys"),
        ("train.steps=[1", "'[1' is not a YAML value"),
    ],
)
def test_mistakes(run: Run, override: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        run.config(override)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_heads_are_split_where_there_are_some(run: Run) -> None:
    split = ("optimizer.name=muon", "optimizer.muon.split_heads=true")
    run.config(*split)
    for override in ("model.layers=[{mixer: conv}]", "model.heads=1"):
        with pytest.raises(UserError, match=r"split_heads has no effect: with model\.heads"):
            run.config(*split, override)


def test_muon_is_not_offloaded(run: Run) -> None:
    assert run.config("optimizer.name=muon", "optimizer.muon.momentum=0.9").optimizer.muon.momentum == 0.9
    with pytest.raises(UserError, match=r"offload_optimizer does not go with optimizer\.name muon"):
        run.config("optimizer.name=muon", "deepspeed.zero_optimization.offload_optimizer.device=cpu")


def test_layers_that_do_not_fit_the_shape(run: Run) -> None:
    with pytest.raises(UserError, match="heads of 15 channels cannot have rotary positions"):
        run.config("model.width=30", "model.layers=[{mixer: softmax, rotary_base: 10000}]")


def test_a_missing_key(tmp_path: Path, run: Run) -> None:
    content = yaml.safe_load(run.file.read_text())
    del content["optimizer"]["lr"]
    (tmp_path / "less.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"optimizer\.lr is missing"):
        load_config(tmp_path / "less.yaml")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML"),
        ("- 1", "must be a mapping"),
        (None, "cannot"),
        ("seed: 2020-13-45", "is not YAML"),
        ("a: &a [*a]", "alias"),
        ("seed: 1\ntrain: {steps: 1, steps: 2}", "names the key 'steps' twice"),
    ],
)
def test_not_a_config(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "x.yaml").write_text(content)
    with pytest.raises(UserError, match=words):
        load_config(tmp_path / "x.yaml")


def test_the_sets_and_stages_of_a_run(run: Run, data: Path) -> None:
    one = run.config()
    assert one.data.sets == ((data, 1.0),)
    assert one.stages == ((0, 64, 512),)
    sets = "{path: a, weight: 3}, {path: b/c, weight: 0.5}"
    batches = (
        "data.curriculum=[{until_step: 1, context_tokens: 16, batch_tokens: 256}, {until_step: 4, batch_tokens: 128}]"
    )
    several = run.config(blend(sets), batches)
    assert several.data.sets == ((Path("a"), 3.0), (Path("b/c"), 0.5))
    assert several.stages == ((0, 16, 256), (1, 64, 128), (4, 64, 512))
    assert [several.tokens_after(step) for step in (0, 1, 3, 6)] == [0, 256, 512, 1664]
    assert several.tokens == 1664


def test_batches_are_shared_out(run: Run) -> None:
    assert batch_plan(run.config(), 2) == (8, 2, 2)
    assert batch_plan(run.config("data.curriculum=[{until_step: 2, batch_tokens: 1024}]"), 2) == (16, 2, 4)
    small = run.config("data.curriculum=[{until_step: 2, batch_tokens: 128}]")
    with pytest.raises(UserError, match=r"curriculum batch_tokens 128 does not divide into 2 .*; try batch_tokens=256"):
        batch_plan(small, 2)
    with pytest.raises(UserError, match=r"512 does not divide into 3 ranks x train.micro_batch_tokens 128; try .*=384"):
        batch_plan(run.config(), 3)


def test_deepspeed_keys_pass_through_unchanged(run: Run) -> None:
    config = run.config("deepspeed.zero_optimization.offload_optimizer.device=cpu", "deepspeed.bf16.enabled=true")
    derived = deepspeed_dict(config, batch_plan(config, 4))
    assert {key: derived[key] for key in config.deepspeed} == config.deepspeed
    assert (
        derived["train_batch_size"],
        derived["train_micro_batch_size_per_gpu"],
        derived["gradient_accumulation_steps"],
    ) == (8, 2, 1)


def test_config_show_prints_the_resolved_config(run: Run) -> None:
    printed = succeed(tostlm("config", "show", str(run.file), "train.steps=7"))
    assert "steps: 7" in printed
    assert "# parameters       37,156" in printed
    assert f"# state            {2 * 8 * (2 * 32 + 2):,} bytes a sequence of 64 tokens" in printed
    assert "# total tokens     3,584" in printed
    fail(tostlm("config", "show", str(run.file), "model.widht=7"), "model.widht", "model.width")


def unmarked_keys(section: type[Section], prefix: str = "") -> list[str]:
    """Return the keys that are neither fixed nor free on resume, nor a section or a tuple of sections."""
    found = []
    for name, field in section.model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, OnResume)]
        inner = [kind for kind in (field.annotation, *get_args(field.annotation)) if isinstance(kind, type)]
        sections = [kind for kind in inner if issubclass(kind, Section)]
        found += [key for kind in sections for key in unmarked_keys(kind, f"{prefix}{name}.")]
        if len(marks) + len(sections) != 1:
            found.append(f"{prefix}{name}")
    return found


def test_every_key_says_whether_a_resumed_run_may_change_it() -> None:
    assert unmarked_keys(RunConfig) == []


def test_the_keys_that_a_resumed_run_must_keep(run: Run) -> None:
    config = run.config(blend("{path: a, weight: 3}, {path: b, weight: 1}"), curriculum((2, 32)))
    keys = list(fixed_values(config))
    assert [key for key in keys if key.startswith("model.")] == [
        f"model.{key.name}" for key in dataclasses.fields(config.model)
    ]
    assert [key for key in keys if not key.startswith("model.")] == [
        *("seed", "data.blend.0.weight", "data.blend.1.weight", "data.context_tokens"),
        *("data.reset_at_documents", "data.within_documents", "data.stateful"),
        *("data.curriculum.0.until_step", "data.curriculum.0.context_tokens"),
        *("data.curriculum.0.batch_tokens", "train.batch_tokens", "optimizer.name", "optimizer.muon.normuon_beta2"),
        "precision",
    ]


def test_a_recipe_sets_what_the_config_leaves_out(run: Run) -> None:
    layers = "model.layers=[{mixer: tssa}, {mixer: softmax}, {mixer: softmax, rotary_base: null}]"
    paper, modern = (run.config(f"model.recipe={name}", layers).model for name in ("paper", "modern"))
    assert paper == run.config(layers).model
    assert (modern.norm, modern.mlp, modern.embed_norm, modern.layer_scale) == (
        "rmsnorm",
        "relu2",
        True,
        paper.layer_scale,
    )
    assert modern.layers == (
        TSSAOptions(),
        SoftmaxOptions(qk_norm=True, rotary_base=10_000.0),
        SoftmaxOptions(qk_norm=True, rotary_base=None),
    )
    mixed = run.config("model.recipe=modern", "model.mlp=swiglu", layers).model
    assert mixed == dataclasses.replace(modern, mlp="swiglu")
    reread = yaml.safe_load(dump_config(run.config("model.recipe=modern")))
    assert "recipe" not in reread["model"]
    assert reread["model"]["norm"] == "rmsnorm"
