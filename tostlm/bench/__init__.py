"""How fast models are, side by side."""

from tostlm.bench.training import Rate, bench_training, table

__all__ = ["Rate", "bench_training", "table"]
