"""Optimizers that DeepSpeed's stages may hold in shards."""

from tostlm.optim.muon import MATRICES, MOMENTUM, Muon, MuonRule
from tostlm.optim.shards import MatrixShard

__all__ = ["MATRICES", "MOMENTUM", "MatrixShard", "Muon", "MuonRule"]
