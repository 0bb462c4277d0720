"""Benchmarks of training, decoding, mixers, the operator, the loss and data, each beside what it is compared with."""

from tostlm.bench.data import report_data
from tostlm.bench.decoding import report_decoding
from tostlm.bench.loss import report_loss
from tostlm.bench.mixers import report_mixers
from tostlm.bench.operator import report_operator
from tostlm.bench.scaling import report_scaling
from tostlm.bench.training import report_training

__all__ = [
    "report_data",
    "report_decoding",
    "report_loss",
    "report_mixers",
    "report_operator",
    "report_scaling",
    "report_training",
]
