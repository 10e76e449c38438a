"""`prism-deco train`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.commands.common import OVERRIDES, Subparsers
from prism_deco.commands.evaluate import score_run
from prism_deco.commands.explain import measure_relevance
from prism_deco.config import load_config
from prism_deco.stages import Stage, split
from prism_deco.stages import run as run_stages

log = logging.getLogger(__name__)


def add(subparsers: Subparsers, common: argparse.ArgumentParser) -> None:
    """Adds `train`."""
    parser = subparsers.add_parser("train", parents=[common], help="compose and train a model, then score it")
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--overwrite", action="store_true", help="replace the run folder if it exists")
    parser.add_argument("--force", action="store_true", help="train even what does not fit the memory by its plan")
    parser.add_argument("--check", action="store_true", help="look for what would stop it, and train nothing")
    parser.set_defaults(command=train)


def train(args: argparse.Namespace) -> int:
    """Composes, trains and scores a model; goes on where an earlier call of the same run has stopped."""
    stages = split(args.arguments)
    config = stages[-1].config if stages else load_config(args.arguments)
    asked = [names for names in (config.evaluate.benchmarks, config.evaluate.relevance) if names]
    if asked:
        from prism_deco.evaluation import resolve

        resolve(",".join(asked))  # a wrong name must not wait for the end of training
    flags = {"--overwrite": args.overwrite, "--force": args.force, "--debug": args.debug}
    if args.check:
        return _check(stages, config, overwrite=args.overwrite, force=args.force)
    if stages:
        return run_stages(args.arguments, [flag for flag, is_set in flags.items() if is_set])
    from prism_deco.training.session import run

    def score(folder: Path) -> None:
        from prism_deco.evaluation import local_device, meet, process_group

        options: dict[str, Any] = OmegaConf.to_container(config.evaluate)  # type: ignore[assignment]
        relevance, limit = options.pop("relevance"), options.pop("relevance_limit")
        if options["benchmarks"]:
            score_run(folder, dict(options))
        if relevance:
            with process_group() as is_first:
                if is_first:  # `explain` shares nothing out, and its files are those of one process
                    about = {"split": options["split"], "limit": limit}
                    measure_relevance(folder, relevance, about, device=local_device(config.trainer.accelerator))
                meet()  # with more patience than the end of training has

    # The other processes of this machine get the same settings; what becomes of an earlier run is decided once.
    arguments = ["train", *args.arguments, *(["--debug"] if args.debug else [])]
    scoring = score if asked else None
    return run(config, scoring, overwrite=args.overwrite, force=args.force, arguments=arguments)


def _check(stages: Sequence[Stage], config: DictConfig, **options: bool) -> int:
    from prism_deco.training.folder import run_folder
    from prism_deco.training.session import check

    before: dict[str, DictConfig] = {}
    for name, its in [(f"Stage {stage.name}: ", stage.config) for stage in stages] or [("", config)]:
        try:
            check(its, after=before.get(its.recipe.start_from), **options)
        except ValueError as error:
            raise ValueError(f"{name}{error}") from error
        log.info("%snothing was found that would stop it", name)
        before[str(run_folder(its))] = its
    return 0
