"""Loading: token shards to batches, with nothing stored but the shards."""

from tostlm.data.loading.loader import BatchStage, Loader, NumpyBatch
from tostlm.data.loading.targets import Targets, choose_targets, evenly_spread
from tostlm.data.loading.token_set import TokenSet

__all__ = ["BatchStage", "Loader", "NumpyBatch", "Targets", "TokenSet", "choose_targets", "evenly_spread"]
