"""Estimates a run's memory, time and disk space before it starts, without weights, data or a GPU."""

from prism_deco.plan.estimate import RunEstimate, estimate_run, problems
from prism_deco.plan.table import PlanTable, as_json

__all__ = ["PlanTable", "RunEstimate", "as_json", "estimate_run", "problems"]
