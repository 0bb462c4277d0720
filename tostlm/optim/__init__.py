"""Optimizers that DeepSpeed's stages may hold in shards."""

from tostlm.optim.muon import MATRICES, MOMENTUM, Muon, MuonRule
from tostlm.optim.shards import MatrixShard
from tostlm.optim.weight_average import EMA, WeightAverage

__all__ = ["EMA", "MATRICES", "MOMENTUM", "MatrixShard", "Muon", "MuonRule", "WeightAverage"]
