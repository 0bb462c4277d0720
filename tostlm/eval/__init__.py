"""Evaluation of trained models: perplexity by context, and generated text."""

from tostlm.eval.generate import generate, generate_text
from tostlm.eval.perplexity import choose_targets, score_contexts
from tostlm.eval.report import evaluate_perplexity

__all__ = ["choose_targets", "evaluate_perplexity", "generate", "generate_text", "score_contexts"]
