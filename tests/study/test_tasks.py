"""That models learn the synthetic tasks, and which tasks are refused."""

import pytest

from tostlm.model import ModelConfig
from tostlm.model.mixers.softmax import SoftmaxOptions
from tostlm.model.mixers.tssa_cross import TSSACrossOptions
from tostlm.study.probe import probe
from tostlm.study.tasks import Task

LEARNERS = (
    TSSACrossOptions(halflife_tokens=(256.0, 256.0)),
    pytest.param(SoftmaxOptions(rotary_base=1e4, short_conv=2), marks=pytest.mark.slow),
)


@pytest.mark.parametrize("options", LEARNERS, ids=lambda o: o.mixer)
def test_models_learn_to_recall(options: SoftmaxOptions | TSSACrossOptions) -> None:
    model = ModelConfig(2, 32, 1, 8, None, (options,), layer_scale=None, norm="rmsnorm", output_init="zero")
    task = Task(kind="recall", tokens=24, pairs=2, vocab_size=16, steps=400, batch_tokens=1536)
    found = probe(model, task, 3e-3, seed=0)
    assert found.keys() == {"24", "96"}
    assert found["24"][0] > 0.9
    untrained = probe(model, task.model_copy(update={"steps": 1}), 3e-3, seed=0)
    assert untrained["24"][0] < 0.3


TASKS = [("induction", 16, 8), ("selective-copy", 16, 8), ("listops", 24, 17), ("ngrams", 16, 4)]


@pytest.mark.parametrize("kind, tokens, vocabulary", TASKS)
def test_every_task_can_be_trained_on(kind: str, tokens: int, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tostlm.study.probe.TEST_TOKENS", 512)
    model = ModelConfig(1, 16, 1, 8, None, (TSSACrossOptions(),), layer_scale=None, norm="rmsnorm")
    task = Task(kind=kind, tokens=tokens, vocab_size=vocabulary, items=4, steps=2, batch_tokens=128)
    found = probe(model, task, 3e-3, seed=0)
    assert found.keys() == {str(tokens), str(4 * tokens)}
    assert all(0 <= right <= 1 and loss is not None for right, loss in found.values())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "recall", "pairs": 9}, "9 pairs, and as many questions, need 36 tokens or more"),
        ({"kind": "recall", "pairs": 4, "vocab_size": 8}, "pairs 4 need a vocab_size of 10 or more"),
        ({"kind": "selective-copy", "items": 17}, "17 items, and as many questions, need 34 tokens or more"),
        ({"kind": "selective-copy", "vocab_size": 2, "items": 2}, "selective-copy needs a vocab_size of 3 or more"),
        ({"kind": "listops", "vocab_size": 16}, "listops needs a vocab_size of 17 or more"),
    ],
)
def test_tasks_that_cannot_be(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Task.model_validate({"tokens": 32, **changes})
