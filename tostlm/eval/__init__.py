"""Evaluation of trained models: perplexity by context, recall of what was read, and generated text."""

from tostlm.eval.evaluate import ALONE, evaluate_perplexity
from tostlm.eval.inputs import EvalSettings
from tostlm.eval.models import TostModel
from tostlm.eval.perplexity import score_contexts
from tostlm.eval.protocols import PROTOCOLS
from tostlm.eval.recall import measure_recall
from tostlm.eval.repetition import loss_by_repetition
from tostlm.eval.sampling import Sampling
from tostlm.eval.writer import Writer

__all__ = [
    "ALONE",
    "PROTOCOLS",
    "EvalSettings",
    "Sampling",
    "TostModel",
    "Writer",
    "evaluate_perplexity",
    "loss_by_repetition",
    "measure_recall",
    "score_contexts",
]
