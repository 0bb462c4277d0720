"""Muon for the matrices inside a model and AdamW for all else, on whatever shards of them a rank's optimizer holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tostlm.optim.orthogonalize import orthogonalize
from tostlm.optim.shards import MatrixExchange, MatrixShard

MATRICES = ("matrices", "matrices_no_decay")  # kinds of the parameter groups that Muon updates
MOMENTUM = "momentum"  # of the state of a tensor that holds matrices
ROW_SQUARES = "row_squares"  # a matrix's state under NorMuon
EPS = 1e-8  # beside the root mean squares of rows
ADAMW_RMS = 0.2  # the root mean square of AdamW's usual update (arXiv 2502.16982)


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MuonRule:
    """How Muon updates matrices."""

    momentum: float
    newton_schulz_steps: int
    newton_schulz_dtype: Literal["bf16", "fp32"]  # of its products
    update_scale: Literal["adamw_rms", "spectral"]
    cautious_weight_decay: bool  # whether weights decay only where the update makes them smaller too
    normuon_beta2: float | None  # of the mean squares by which the rows of an update are divided; None for none


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups of matrices, AdamW for the others.

        m = momentum m + (1 - momentum) g        u = momentum m + (1 - momentum) g
        W = (1 - lr weight_decay) W - lr scale orthogonalize(u)

    The scale is sqrt(max(1, rows / columns)) where it is `spectral`, and 0.2 sqrt(max(rows, columns)) where it is
    `adamw_rms`, which makes an update as large as AdamW's usually is, so that one learning rate serves both.

    Momentum and decay go element by element, so they need no whole matrix. For Newton-Schulz each matrix comes together
    on one rank, which sends every rank its part of the update.

    With `normuon_beta2`, each row of O = orthogonalize(u) is divided by the root of a moving average of its mean
    squares, v = beta2 v + (1 - beta2) mean(O^2), and the whole brought back to the norm of O.

    Sources: Keller Jordan's Muon (kellerjordan.github.io/posts/muon), with Nesterov's momentum; `adamw_rms`, Moonlight
    (arXiv 2502.16982); cautious weight decay (arXiv 2510.12402); NorMuon (arXiv 2510.05491).
    """

    def __init__(self, groups: Sequence[dict[str, Any]], rule: MuonRule, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._rule = rule
        self.matrices: frozenset[str] = frozenset()  # their names
        self.row_squares: dict[str, Tensor] = {}  # of each matrix, [rows], the same on all ranks; {} without NorMuon
        self._shards: dict[int, list[MatrixShard]] = {}  # by the identity of their owner
        self._exchanges: dict[tuple[int, ...], MatrixExchange] = {}  # by those of the owners that are updated together

    def bind(self, shards: Sequence[MatrixShard]) -> None:
        """Say where the matrices lie, in the same order on every rank, once the optimizer has its final tensors."""
        self.matrices = frozenset(shard.name for shard in shards)
        self._exchanges.clear()  # DeepSpeed may have made an update of nothing before
        for shard in shards:
            self._shards.setdefault(id(shard.owner), []).append(shard)
            if self._rule.normuon_beta2 is not None:
                self.row_squares[shard.name] = shard.owner.detach().new_zeros(shard.shape[0])

    def holds_matrices(self, owner: Tensor) -> bool:
        """Return whether a tensor of the optimizer holds parts of matrices."""
        return id(owner) in self._shards

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["kind"] not in MATRICES]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["kind"] in MATRICES:
                self._step_matrices(group)

    def momentum(self, owner: Tensor) -> Tensor:
        """Return the momentum of a tensor that holds matrices, laid out as it."""
        state = self.state[owner]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(owner, requires_grad=False)
        momentum: Tensor = state[MOMENTUM]
        return momentum

    def _step_matrices(self, group: dict[str, Any]) -> None:
        beta, lr, decay = self._rule.momentum, group["lr"], group["weight_decay"]
        updates = {}
        for owner in group["params"]:
            if owner.grad is not None:
                updates[owner] = owner.grad.lerp(self.momentum(owner).lerp_(owner.grad, 1 - beta), beta)
        shards = [shard for owner in updates for shard in self._shards.get(id(owner), ())]
        assert shards or not updates or not lr, "bind comes before the first update"
        together = tuple(map(id, updates))
        if together not in self._exchanges:
            self._exchanges[together] = MatrixExchange(shards)
        exchange, parts = self._exchanges[together], [shard.part(updates[shard.owner]) for shard in shards]
        wholes = exchange.gather(parts)
        for matrix, whole in wholes.items():
            whole.copy_(self._update(shards[matrix], whole))
        exchange.scatter(wholes, parts)
        if self.row_squares:
            exchange.share([self.row_squares[shard.name] for shard in shards])
        for owner, update in updates.items():
            kept = (owner * update > 0) if self._rule.cautious_weight_decay else 1.0
            owner.sub_(lr * (update + decay * kept * owner))

    def _update(self, shard: MatrixShard, u: Tensor) -> Tensor:
        """Return the scaled update of a whole matrix, flat as `u` is."""
        blocks = u.view(shard.blocks, -1, shard.shape[1])
        rule, (rows, columns) = self._rule, blocks.shape[1:]
        spectral = rule.update_scale == "spectral"
        scale = math.sqrt(max(1, rows / columns)) if spectral else ADAMW_RMS * math.sqrt(max(rows, columns))
        update = orthogonalize(blocks, rule.newton_schulz_steps, DTYPES[rule.newton_schulz_dtype])
        if rule.normuon_beta2 is not None:
            mean_squares = update.square().mean(-1, keepdim=True)
            squares = self.row_squares[shard.name].view_as(mean_squares).lerp_(mean_squares, 1 - rule.normuon_beta2)
            even = update / (squares.sqrt() + EPS)
            update = even * (_norms(update) / _norms(even).clamp_min(EPS))
        return scale * update.flatten()


def _norms(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True)
    return norms
