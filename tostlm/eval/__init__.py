"""What trained models are worth."""

from tostlm.eval.generate import generate
from tostlm.eval.perplexity import Score, choose_targets, score_contexts
from tostlm.eval.report import ModelScores, table, write_report

__all__ = ["ModelScores", "Score", "choose_targets", "generate", "score_contexts", "table", "write_report"]
