"""lm-eval's requests, answered by a checkpoint: the numbers of its forward pass, and those of lm-eval's own models."""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
import transformers
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional as F

from tests.conftest import Run, fail, succeed, tostlm
from tests.warm import Program
from tostlm.checkpoint import load_checkpoint
from tostlm.convert import convert, write_hf
from tostlm.data import Tokenizer
from tostlm.errors import UserError
from tostlm.eval.generate import prompt_tokens
from tostlm.eval.harness import HarnessLM
from tostlm.model import LMState

OFFLINE = "import huggingface_hub.constants; huggingface_hub.constants.HF_HUB_OFFLINE = True"
CONTEXT = "Fellow citizens of the"
CHOICES = [" Senate", " House of Representatives", " United States, a", " x"]


def ask(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, asked, number) for number, asked in enumerate(arguments)]


@pytest.fixture(scope="module", params=["tssa", "softmax"])
def model(trained: dict[str, Run], request: pytest.FixtureRequest) -> HarnessLM:
    return HarnessLM(trained[request.param].dir)


@torch.no_grad()
def whole(model: HarnessLM, ids: list[int], scored: int) -> tuple[float, bool]:
    """The log-probability of the last tokens by one forward pass over all, and whether each is the likeliest."""
    logits = model.model.lm(torch.tensor([ids[:-1]]))[0][0, -scored:].double()
    targets = torch.tensor(ids[-scored:])
    greedy = bool((logits[:, : model.model.tokenizer.vocab_size].argmax(-1) == targets).all())
    return -float(F.cross_entropy(logits, targets, reduction="sum")), greedy


def split(model: HarnessLM, context: str, continuation: str) -> tuple[list[int], int]:
    """The tokens of both texts as one, and how many of them are behind the context's."""
    ids, before = (prompt_tokens(model.model.tokenizer, text) for text in (context + continuation, context))
    return ids, len(ids) - len(before)


def test_choices_of_shared_contexts_have_the_numbers_of_one_forward_pass(model: HarnessLM) -> None:
    contexts = [CONTEXT, "", "We", "It is", CONTEXT + " whole and", "a b c d e f g"]
    pairs = [(context, choice) for choice in CHOICES for context in contexts]
    for (context, choice), answer in zip(pairs, model.loglikelihood(ask("loglikelihood", *pairs)), strict=True):
        expected, greedy = whole(model, *split(model, context, choice))
        assert answer == (pytest.approx(expected, abs=1e-5), greedy)


@pytest.mark.parametrize("batch_tokens", [1, 30, 8192])
def test_batches_and_shared_contexts_change_nothing(trained: dict[str, Run], batch_tokens: int) -> None:
    model = HarnessLM(trained["tssa"].dir, batch_tokens=batch_tokens)
    pairs = [(context, choice) for context in (CONTEXT, "We are") for choice in CHOICES]
    alone = [model.loglikelihood(ask("loglikelihood", pair))[0] for pair in pairs]
    together = model.loglikelihood(ask("loglikelihood", *pairs))
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]
    assert [found for found, _ in together] == pytest.approx([found for found, _ in alone], abs=1e-5)


def test_a_shared_context_is_read_once(trained: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = HarnessLM(trained["tssa"].dir), list[int]()
    hidden = model.model.lm.hidden

    def counted(tokens: torch.Tensor, state: LMState | None = None) -> Any:
        read.append(tokens.numel())
        return hidden(tokens, state)

    monkeypatch.setattr(model.model.lm, "hidden", counted)
    model.loglikelihood(ask("loglikelihood", *((CONTEXT, choice) for choice in CHOICES)))
    ends = [split(model, CONTEXT, choice) for choice in CHOICES]
    context, longest = len(ends[0][0]) - ends[0][1], max(scored for _, scored in ends)
    assert read == [context - 1, len(CHOICES) * longest]


def test_what_greedy_generation_writes_is_greedy(model: HarnessLM) -> None:
    """From the start of a document on, so that no text is divided into tokens twice."""
    writing = [model.eot_token_id]
    for _ in range(5):
        logits = model.model.lm(torch.tensor([writing]))[0][0, -1]
        writing.append(int(logits.argmax()))
    other = [*writing[1:-1], (writing[-1] + 1) % 512]
    requests = [(None, writing[:1], writing[1:]), (None, writing[:1], other), (None, writing[:3], writing[3:])]
    assert [greedy for _, greedy in model._loglikelihood_tokens(requests)] == [True, False, True]


def test_spaces_at_the_edge_belong_to_the_continuation(model: HarnessLM) -> None:
    (one,), (other,) = (
        model.loglikelihood(ask("loglikelihood", pair)) for pair in ((CONTEXT + " ", "Senate"), (CONTEXT, " Senate"))
    )
    assert one == pytest.approx(other, abs=1e-6)


def test_a_whole_text_is_scored_from_its_first_token_on(trained: dict[str, Run], speeches: list[str]) -> None:
    model = HarnessLM(trained["tssa"].dir, batch_tokens=100)
    texts = [speeches[0][:900], "", speeches[1][:40], speeches[2][:333]]
    found = model.loglikelihood_rolling(ask("loglikelihood_rolling", *((text,) for text in texts)))
    for text, value in zip(texts, found, strict=True):
        ids = prompt_tokens(model.model.tokenizer, text)
        assert value == pytest.approx(whole(model, ids, len(ids) - 1)[0] if text else 0, abs=1e-3, rel=1e-6)


def test_learned_positions_read_windows_and_the_last_tokens(trained: dict[str, Run], speeches: list[str]) -> None:
    model, text = HarnessLM(trained["softmax"].dir), speeches[0][:600]
    ids = prompt_tokens(model.model.tokenizer, text)
    assert len(ids) > 3 * 64
    last = ids[-65:]
    windows = [whole(model, ids[n : n + 65], 64)[0] for n in range(0, len(ids) - 65, 64)]
    windows.append(whole(model, last, (len(ids) - 1) % 64 or 64)[0])
    assert model.loglikelihood_rolling(ask("", (text,))) == [pytest.approx(sum(windows), abs=1e-3)]
    tokens, scored = split(model, text, CHOICES[1])
    assert model.loglikelihood(ask("", (text, CHOICES[1])))[0][0] == pytest.approx(
        whole(model, tokens[-65:], scored)[0], abs=1e-5
    )
    (written,) = model.generate_until(ask("", (text, {"until": [], "max_gen_toks": 4})))
    assert written == model.generate_until(ask("", (text, {"max_gen_toks": 4})))[0]
    with pytest.raises(UserError, match=r"the 256 new tokens of a task leave a context no room .* 64 positions"):
        model.generate_until(ask("", (text, {"until": ["\n"]})))
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens is longer than the model's 64 positions"):
        model.loglikelihood(ask("", ("", text)))


def test_generated_text_is_that_of_the_subcommand(trained: dict[str, Run], model: HarnessLM) -> None:
    run, prompts = str(model.model.folder), [CONTEXT, "We", "", "It", "Fellow citizens"]
    options = {"until": ["\n\n", "zzz"], "max_gen_toks": 24, "do_sample": False}
    found = model.generate_until(ask("generate_until", *((prompt, options) for prompt in prompts)))
    for prompt, text in list(zip(prompts, found, strict=True))[:2]:
        asked = ("--prompt", prompt, "--tokens", "24", "--temperature", "0", "--stop", "\n\n", "--stop", "zzz")
        assert succeed(tostlm("generate", run, *asked)) == f"{prompt}{text}\n"
    end = found[0][5:7]
    stopped = model.generate_until(ask("generate_until", (CONTEXT, {"until": end, "max_gen_toks": 24})))
    assert stopped == [found[0][: found[0].index(end)]]


def test_a_task_that_asks_for_what_is_not_offered(model: HarnessLM) -> None:
    for options, words in (
        ({"num_beams": 4}, "num_beams above 1"),
        ({"penalty_alpha": 0.6}, "penalty_alpha, which is not offered"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 0}, "top_k 0 must be 1 or more"),
        ({"max_gen_toks": -3}, "max_gen_toks -3 must be 1 or more"),
        ({"max_gen_toks": "many"}, "cannot be used: invalid literal .* 'many'"),
        ({"until": [5]}, r"until \[5\] strings"),
    ):
        with pytest.raises(UserError, match=words):
            model.generate_until(ask("", (CONTEXT, {"max_gen_toks": 4, **options})))


def test_a_model_that_diverged_has_no_answers(trained: dict[str, Run]) -> None:
    """The likeliest of numbers that are none is the first one, and a task's right answer often is too."""
    model = HarnessLM(trained["tssa"].dir)
    with torch.no_grad():
        model.model.lm.norm.weight.fill_(torch.nan)
    with pytest.raises(UserError, match="a loss is not finite; the model has diverged"):
        model.loglikelihood(ask("", (CONTEXT, CHOICES[0])))


@pytest.fixture(scope="module")
def local_tasks(speeches: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of each kind, and one of minimal pairs, from files."""
    folder = tmp_path_factory.mktemp("tasks")
    pieces = [text.split(". ")[1:7] for text in speeches[:6]]
    words = [piece.split() for of_text in pieces for piece in of_text if len(piece.split()) > 5]
    rows = {
        "choices": [
            {"start": " ".join(w[:4]), "ends": [" ".join(w[4:6]), "of the", " ".join(w[5:3:-1])], "right": n % 3}
            for n, w in enumerate(words[:12])
        ],
        "texts": [{"text": text[:250]} for text in speeches[:4]],
        "writing": [{"start": " ".join(w[:3]), "end": w[3]} for w in words[:4]],
        "pairs": [
            {"sentence_good": " ".join(w[:6]), "sentence_bad": " ".join(w[3:6] + w[:3])} for w in words if len(w) > 5
        ],
    }
    scored = {"output_type": "multiple_choice", "metric_list": [{"metric": "acc"}]}
    generated = {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False}
    kinds: dict[str, dict[str, Any]] = {
        "choices": {**scored, "doc_to_text": "{{start}}", "doc_to_choice": "{{ends}}", "doc_to_target": "right"},
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "writing": {
            "output_type": "generate_until",
            "doc_to_text": "{{start}}",
            "doc_to_target": "{{end}}",
            "generation_kwargs": generated,
            "metric_list": [{"metric": "exact_match"}],
        },
        "pairs": {
            **scored,
            "doc_to_text": "",
            "doc_to_target": 0,
            "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        },
    }
    for name, task in kinds.items():
        file = folder / f"{name}.json"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
        about = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": str(file)}}
        content = {**about, "test_split": "train", "num_fewshot": 0, **task, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    return folder


def evaluate(model: Any, folder: Path, *tasks: str) -> dict[str, Any]:
    manager = TaskManager(include_path=folder, include_defaults=False)
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model, tasks=[f"local_{task}" for task in tasks], task_manager=manager, bootstrap_iters=0
    )
    return found


def answers(results: dict[str, Any], task: str) -> Iterable[Any]:
    return [sample["filtered_resps"] for sample in results["samples"][f"local_{task}"]]


@pytest.mark.parametrize("mixer", ["tssa", "softmax"])
def test_an_export_in_lm_evals_own_model_has_the_same_results(
    trained: dict[str, Run], local_tasks: Path, tmp_path: Path, mixer: str
) -> None:
    convert(load_checkpoint(trained[mixer].dir), tmp_path / "hf", write_hf)
    transformers.utils.logging.disable_progress_bar()
    code = {"trust_remote_code": mixer == "tssa", "device": "cpu", "dtype": "float32", "batch_size": 3}  # padded
    theirs = HFLM(pretrained=str(tmp_path / "hf"), **code)
    own = HarnessLM(trained[mixer].dir)
    tasks = ("choices", "pairs", "writing")
    found, expected = evaluate(own, local_tasks, *tasks), evaluate(theirs, local_tasks, *tasks)
    assert found["results"]["local_choices"]["acc,none"] == expected["results"]["local_choices"]["acc,none"]
    assert found["results"]["local_pairs"]["acc,none"] == expected["results"]["local_pairs"]["acc,none"]
    for task in ("choices", "pairs"):
        for one, other in zip(answers(found, task), answers(expected, task), strict=True):
            assert [loss for loss, _ in one] == pytest.approx([loss for loss, _ in other], abs=1e-4)
            assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
    assert answers(found, "writing") == answers(expected, "writing")
    # Exports put the end-of-document token before a text, where lm-eval puts it before a whole text too.
    once = HFLM(pretrained=str(tmp_path / "hf"), add_bos_token=False, **code)
    found, expected = evaluate(own, local_tasks, "texts"), evaluate(once, local_tasks, "texts")
    for metric in ("word_perplexity,none", "bits_per_byte,none"):
        assert found["results"]["local_texts"][metric] == pytest.approx(
            expected["results"]["local_texts"][metric], rel=1e-5
        )


def test_a_checkpoint_is_a_model_by_name(trained: dict[str, Run], local_tasks: Path) -> None:
    asked = {"model": "tostlm", "model_args": f"checkpoint={trained['tssa'].dir},batch_tokens=64", "bootstrap_iters": 0}
    manager = TaskManager(include_path=local_tasks, include_defaults=False)
    by_name = lm_eval.simple_evaluate(**asked, tasks=["local_pairs"], task_manager=manager)
    own = evaluate(HarnessLM(trained["tssa"].dir), local_tasks, "pairs")
    assert by_name["results"] == own["results"]


def test_the_subcommand(trained: dict[str, Run], local_tasks: Path, tmp_path: Path) -> None:
    runs = [str(trained[mixer].dir) for mixer in ("tssa", "softmax")]
    options = ("--tasks", "local_pairs,local_te*", "--include-path", str(local_tasks), "--limit", "3")
    printed = succeed(tostlm("eval", "harness", *runs, *options, "--out", str(tmp_path)))
    assert printed.count("local_pairs") == printed.count("local_texts") == 2
    assert printed.endswith(f"written to {tmp_path}/harness.json\n")
    content = json.loads((tmp_path / "harness.json").read_text())
    assert (content["lm_eval"], content["limit"]) == (lm_eval.__version__, 3)
    for run, model in zip(runs, content["models"], strict=True):
        assert model["checkpoint"].startswith(run) and model["step"] == 6
        assert model["n-samples"]["local_pairs"]["effective"] == 3
        assert model["results"]["local_texts"]["word_perplexity,none"] > 1


def test_mistakes(trained: dict[str, Run], local_tasks: Path, tmp_path: Path) -> None:
    command = ("eval", "harness", str(trained["tssa"].dir), "--out", str(tmp_path / "out"), "--tasks")
    fail(tostlm(*command, "lambada_opennai"), "knows no task lambada_opennai", "lambada_openai", "lm_eval ls tasks")
    fail(tostlm(*command, ","), "--tasks ',' names none")
    fail(tostlm(*command, "x", "--include-path", str(tmp_path / "no")), "is no folder with tasks of lm-eval")
    (tmp_path / "elsewhere.yaml").write_text("{task: elsewhere, dataset_path: nobody/elsewhere, test_split: test}")
    there = ("elsewhere", "--include-path", str(tmp_path))
    offline = Program(*command, *there, before=partial(exec, OFFLINE), HF_HOME=str(tmp_path / "hub")).end()
    fail(offline, "lm-eval cannot load elsewhere: Couldn't", "(--include-path)")
    fail(tostlm("eval", "harness", str(tmp_path), "--tasks", "wikitext"), "checkpoint")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    fail(tostlm("eval", "harness", str(tmp_path / "hf"), "--tasks", "x"), "which lm-eval reads itself")
    missing = Program(*command, "wikitext", before=partial(exec, "import sys; sys.modules['lm_eval'] = None")).end()
    fail(missing, "lm-eval, which is not installed; `pip install 'tostlm[harness]'`")


def test_a_continuation_without_a_token_of_its_own(model: HarnessLM, tokenizer: Tokenizer) -> None:
    piece = next(p for p in tokenizer.pieces if len(p) > 2 and p.isalpha() and len(tokenizer.encode(p)) == 1)
    with pytest.raises(UserError, match=r"none of its tokens is of the second alone; change the task's target_del"):
        model.loglikelihood(ask("", (piece[:1], piece[1:])))
