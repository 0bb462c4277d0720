"""Evaluation of trained models: perplexity by context, and generated text."""

from tostlm.eval.generate import generate, generate_text
from tostlm.eval.perplexity import Score, choose_targets, score_contexts
from tostlm.eval.report import ModelScores, evaluate_perplexity, table, write_report

__all__ = [
    "ModelScores",
    "Score",
    "choose_targets",
    "evaluate_perplexity",
    "generate",
    "generate_text",
    "score_contexts",
    "table",
    "write_report",
]
