"""What a run will take, before it is queued: memory, time, traffic and money, reckoned from its config."""

from tostlm.plan.fit import USABLE, fits, require_fit, way_out
from tostlm.plan.memory import Memory, memory
from tostlm.plan.plan import Plan, plan_runs
from tostlm.plan.report import report_plans
from tostlm.plan.sizes import checkpoint_bytes, total_parameters

__all__ = [
    "USABLE",
    "Memory",
    "Plan",
    "checkpoint_bytes",
    "fits",
    "memory",
    "plan_runs",
    "report_plans",
    "require_fit",
    "total_parameters",
    "way_out",
]
