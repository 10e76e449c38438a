"""Plans of several runs, on all cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.plan.cell import Plan, plan_run

FEW = 4
"""So many runs are planned in less time than other processes take to start."""


def plan_runs(configs: Mapping[str, DictConfig], **options: Any) -> list[Plan]:
    """Plans runs by name, in their order; `options` are those of `plan_run`."""
    by_llm: dict[str, list[str]] = {}
    for name, config in configs.items():
        by_llm.setdefault(config.llm.name, []).append(name)
    # What runs of one LLM have in common is walked through once in a process. The longest list goes first.
    shares = sorted(by_llm.values(), key=len, reverse=True)
    processes = min(len(shares), os.cpu_count() or 1)
    if processes == 1 or len(configs) <= FEW or "fork" not in multiprocessing.get_all_start_methods():
        return [plan_run(config, name, **options) for name, config in configs.items()]
    # Forked, they need not import anything again.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        made = [pool.submit(_plan, [(name, _plain(configs[name])) for name in share], options) for share in shares]
        plans = {name: plan for job in made for name, plan in job.result().items()}
    return [plans[name] for name in configs]


def _plain(config: DictConfig) -> dict[Any, Any]:
    """The schema's classes are made at run time, and cannot be sent to another process."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    return content


def _plan(runs: Sequence[tuple[str, dict[Any, Any]]], options: Mapping[str, Any]) -> dict[str, Plan]:
    return {name: plan_run(OmegaConf.create(content), name, **options) for name, content in runs}
