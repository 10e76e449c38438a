"""What a run will take before it is started: memory, time, disk. No weights, no data and no GPU are needed."""

from prism_deco.plan.estimate import AUTO, DEFAULT_MFU, RunEstimate, estimate_run, problems
from prism_deco.plan.table import PlanTable, as_json

__all__ = ["AUTO", "DEFAULT_MFU", "PlanTable", "RunEstimate", "as_json", "estimate_run", "problems"]
