"""States one after the other, each made of the one before, as one operation."""

from tostlm.chain.operator import chain, delta_chain

__all__ = ["chain", "delta_chain"]
