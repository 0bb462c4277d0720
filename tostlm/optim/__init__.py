"""Optimizers that DeepSpeed's stages may hold in shards."""

from tostlm.optim.muon import MATRICES, MOMENTUM, ROW_SQUARES, Muon, MuonRule
from tostlm.optim.shards import MatrixShard
from tostlm.optim.weight_average import EMA, WeightAverage

__all__ = ["EMA", "MATRICES", "MOMENTUM", "ROW_SQUARES", "MatrixShard", "Muon", "MuonRule", "WeightAverage"]
