"""What is measured of a trained run of a study."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from tostlm.checkpoint import load_checkpoint
from tostlm.config import RunConfig
from tostlm.data import TRAIN, VALIDATION, Targets, TokenSet, choose_targets, read_manifest
from tostlm.device import best_device
from tostlm.errors import UserError
from tostlm.eval import TostModel, loss_by_repetition, score_contexts
from tostlm.files import read_json_lines
from tostlm.model import count_body_parameters, count_parameters, state_bytes, training_flops_per_token
from tostlm.study.plan import Cell, Study
from tostlm.study.probe import probe
from tostlm.study.results import Result, evaluation_of, settings_of

GRADIENTS_BEFORE = 100  # steps over whose gradients' norms the running median is taken
WARM_UP = 20  # first steps, whose gradients have no median yet


def measure(study: Study, cell: Cell, config: RunConfig) -> Result:
    """Return the result of a run that has been trained; of a search, without what is measured beside its loss.

    Raises:
        UserError: the loss at the end of training is not on record.
    """
    metrics = config.run_dir / "metrics.jsonl"
    entries, _ = read_json_lines(metrics)
    validation = [[e["step"], e["tokens"], e["loss"]] for e in entries if e["kind"] == "validation"]
    train = [e for e in entries if e["kind"] == "train"]
    if not validation or validation[-1][0] != config.train.steps or not train:
        raise UserError(f"{metrics} has no loss of the last step; remove {config.run_dir} to train it again")
    context = config.data.context_tokens
    result = Result(
        lr=config.optimizer.lr,
        settings=settings_of(study, cell, config),
        loss=validation[-1][2],
        tokens=config.tokens,
        parameters=count_parameters(config.model),
        body_parameters=count_body_parameters(config.model),
        flops_per_token=training_flops_per_token(config.model, context),
        state_bytes=state_bytes(config.model, context),
        tokens_per_second=statistics.median(e["tokens_per_second"] for e in train),
        validation=validation,
        evaluation=evaluation_of(study, cell),
        largest_gradient=largest_gradient([(e["step"], e["grad_norm"]) for e in train if e.get("grad_norm")]),
    )
    if cell.kind == "search":
        return result
    model = TostModel(load_checkpoint(config.run_dir, best_device()))
    tokens, targets = held_out_targets(study, config)
    scores = score_contexts(model, tokens, targets, study.contexts)
    result.contexts.update({str(score.context): score.nats for score in scores})
    result.repetition.update(loss_by_repetition(model, tokens, TokenSet(config.data.folders[0], TRAIN)))
    return result


def measure_task(study: Study, cell: Cell, config: RunConfig) -> Result:
    """Train a model on a synthetic task at each of its learning rates, and return the result of the best."""
    task = study.tasks[cell.task]
    found = {lr: probe(config.model, task, lr, cell.seed) for lr in task.lrs}
    first = str(task.lengths[0] * task.tokens)

    def merit(lr: float) -> tuple[float, float]:
        right, loss = found[lr][first]
        return right, -math.inf if loss is None else -loss

    lr = max(found, key=merit)
    return Result(
        lr=lr,
        settings=settings_of(study, cell, config),
        loss=found[lr][first][1],
        body_parameters=count_body_parameters(config.model),
        state_bytes=state_bytes(config.model, task.tokens),
        answers=found[lr],
    )


def held_out_targets(study: Study, config: RunConfig) -> tuple[TokenSet, Targets]:
    """Return the held-out tokens of a study, and which of them a run is scored on.

    Raises:
        UserError: the data is not prepared, or with another tokenizer than the run's, or no document is long enough.
    """
    asked, own = study.evaluation, config.data.folders[0]
    assert asked is not None
    tokens = TokenSet(asked.data or own, VALIDATION)
    if tokens.manifest.tokenizer_sha256 != read_manifest(own).tokenizer_sha256:
        raise UserError(f"{tokens.folder} was prepared with another tokenizer than {own}; prepare it with that one's")
    return tokens, choose_targets(tokens, asked.contexts, asked.windows)


def largest_gradient(norms: Sequence[tuple[int, float]]) -> list[float]:
    """Return the largest ratio of a gradient's norm to the median of those before it, and its step."""
    ratios = [
        [norm / statistics.median(before for _, before in norms[max(0, n - GRADIENTS_BEFORE) : n]), step]
        for n, (step, norm) in enumerate(norms)
        if n >= WARM_UP
    ]
    return max(ratios, default=[])
