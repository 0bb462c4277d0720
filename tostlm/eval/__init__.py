"""Evaluation of trained models: perplexity by context, rare words read before, and generated text."""

from tostlm.eval.evaluate import ALONE, EvalSettings, evaluate_perplexity
from tostlm.eval.models import TostModel
from tostlm.eval.perplexity import score_contexts
from tostlm.eval.protocols import PROTOCOLS
from tostlm.eval.repetition import loss_by_repetition

__all__ = [
    "ALONE",
    "PROTOCOLS",
    "EvalSettings",
    "TostModel",
    "evaluate_perplexity",
    "loss_by_repetition",
    "score_contexts",
]
