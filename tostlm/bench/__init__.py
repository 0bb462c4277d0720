"""Benchmarks: speeds of models, the operator and the data pipeline, each side by side with what it is compared with."""

from tostlm.bench.training import Rate, bench_training, describe_machine, report_training, table

__all__ = ["Rate", "bench_training", "describe_machine", "report_training", "table"]
