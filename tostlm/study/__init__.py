"""Studies: many models on the same tokens, each at its own best learning rate, over seeds, in one table."""

from tostlm.study.plan import Study, load_study
from tostlm.study.run import run_study, study_progress

__all__ = ["Study", "load_study", "run_study", "study_progress"]
