"""Training a model on a synthetic task, and how often it is then right."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tostlm.device import best_device
from tostlm.model import IGNORE, LM, ModelConfig, create_lm, parameter_groups
from tostlm.study.tasks import Task

SOLVED = 0.999  # of the answers right: training ends
TEST_TOKENS = 65_536  # read at each length
CHECK_STEPS = 50
WEIGHT_DECAY, CLIP = 0.1, 1.0
Answer = tuple[float, float | None]  # the share of right answers, and nats above the best possible loss, if finite


def probe(model: ModelConfig, task: Task, lr: float, seed: int) -> dict[str, Answer]:
    """Train a model on a task and return how often it is then right, by tested length in tokens up to its positions.

    Learning rates rise over the first tenth of the steps and fall to zero as a cosine.
    """
    device = best_device()
    lm = create_lm(replace(model, vocab_size=task.vocab_size), seed).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(lm, WEIGHT_DECAY), lr=lr, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(seed + 1)
    warmup = max(1, task.steps // 10)
    for step in range(task.steps):
        share = min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / task.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        examples = task.draw(generator, max(1, task.batch_tokens // task.tokens), task.tokens)
        loss, _ = lm(examples.tokens.to(device), targets=examples.targets.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % CHECK_STEPS == 0 and answer(lm, task, task.tokens, seed)[0] >= SOLVED:
            break
    lengths = (times * task.tokens for times in task.lengths)
    limit = math.inf if model.positions is None else model.positions
    return {str(length): answer(lm, task, length, seed) for length in lengths if length <= limit}


@torch.no_grad()
def answer(lm: LM, task: Task, tokens: int, seed: int) -> Answer:
    """Return how often it is right on new sequences."""
    device, generator = lm.embed.weight.device, torch.Generator().manual_seed(seed + (1 << 20))
    right = asked = excess = 0.0
    batch = max(1, task.batch_tokens // tokens)
    rounds = max(1, TEST_TOKENS // (batch * tokens))
    lm.eval()
    for _ in range(rounds):
        examples = task.draw(generator, batch, tokens)
        targets = examples.targets.to(device)
        logits, _ = lm(examples.tokens.to(device))
        scored = targets != IGNORE
        right += float((logits.argmax(-1) == targets)[scored].sum())
        asked += float(scored.sum())
        loss = torch.nn.functional.cross_entropy(logits[scored].float(), targets[scored])
        excess += (float(loss) - examples.best_loss) / rounds
    lm.train()
    return right / asked, excess if math.isfinite(excess) else None
