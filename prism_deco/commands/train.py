"""`prism-deco train`: trains a model and scores it."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.commands.common import OVERRIDES, own_benchmarks
from prism_deco.commands.explain import has_relevance, measure_relevance
from prism_deco.commands.keys import print_config
from prism_deco.commands.scoring import Tokens, score_run
from prism_deco.config import load_config
from prism_deco.config.choices import choice_name, group_keys, resolve_asks, resolve_benchmarks, results_name
from prism_deco.errors import UsageError
from prism_deco.stages import Stage, split
from prism_deco.stages import run as run_stages

if TYPE_CHECKING:
    from prism_deco.distributed import World

log = logging.getLogger(__name__)


def train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("arguments", nargs="*", metavar="KEY=VALUE", help=OVERRIDES)
    parser.add_argument("--print", action="store_true", help="print the configuration and where each value comes from")
    parser.add_argument("--check", action="store_true", help="check for what would stop the run, without training")
    parser.add_argument("--overwrite", action="store_true", help="replace the run folder if it exists")
    parser.add_argument("--force", action="store_true", help="train even if the estimated memory does not suffice")


def train(args: argparse.Namespace) -> int:
    """Compose, train and score a model. A run that was stopped continues with the same command."""
    stages = split(args.arguments)
    if args.print:
        print_config(stages, args.arguments)
        return 0
    # Of a recipe with stages, only the last one is scored.
    config = stages[-1].config if stages else load_config(args.arguments)
    scoring = _scoring(config)
    flags = {"--overwrite": args.overwrite, "--force": args.force, "--debug": args.debug}
    if args.check:
        return _check(stages, config, overwrite=args.overwrite, force=args.force)
    if stages:
        return run_stages(args.arguments, [flag for flag, is_set in flags.items() if is_set])
    from prism_deco.training.entry import run

    return run(config, scoring, overwrite=args.overwrite, force=args.force)


@dataclass(frozen=True)
class _Scoring:
    """The scoring after training, as set under `evaluate` in the configuration.

    It is pickled for the ranks, so it holds plain values: the classes of a composed configuration cannot be pickled.

    Attributes:
        keys: of `evaluate`.
        own: keys of single benchmarks by name, those of the groups overridden by the configuration's.
        llm: keys of the LLM, which defines how it can be asked.
    """

    benchmarks: tuple[str, ...]
    relevance: str | None
    keys: dict[str, Any]
    own: dict[str, dict[str, Any]]
    llm: dict[str, Any]
    accelerator: str

    def prepare(self, benchmarks: Path | None) -> None:
        """Reads all questions, so that a wrong name, split or file is reported before training."""
        from prism_deco.evaluation.choose import check_keys, prepare, prepare_one
        from prism_deco.llms.spec import check_ask, read_spec

        spec = read_spec(self.llm)
        for ask in self._asks:
            check_ask(spec, ask)
        check_keys([*self.benchmarks, *([self.relevance] if self.relevance else [])], (), self.own)
        try:
            if self.benchmarks:
                prepare(self.benchmarks, self._options, self.own, root=benchmarks)
        except UsageError as error:
            raise UsageError(f"evaluate.benchmarks: {error}") from error
        try:
            if self.relevance:
                prepare_one(self.relevance, self._relevance_options(), root=benchmarks, boxes=True)
        except UsageError as error:
            raise UsageError(f"evaluate.relevance: {error}") from error

    def missing(self, folder: Path) -> _Scoring | None:
        """The part of this scoring that has no results in the folder yet; None if there is none."""
        scored = {path.parent for path in folder.glob("eval/**/metrics.json")}
        roots = [folder / "eval" / tokens.folder for tokens in (Tokens(), *self.fewer_tokens)]
        benchmarks = []
        for name in self.benchmarks:
            names = [results_name(name, self._split(name), ask) for ask in self._asks]
            # A benchmark is complete with every way to ask, at every number of visual tokens.
            wanted = {root / own for root in roots for own in names}
            if not wanted <= scored:
                benchmarks.append(name)
        relevance = self.relevance
        if relevance and has_relevance(folder, relevance, self._split(relevance)):
            relevance = None
        if not (benchmarks or relevance):
            return None
        return replace(self, benchmarks=tuple(benchmarks), relevance=relevance)

    def __call__(self, folder: Path, world: World) -> None:
        from prism_deco.distributed import local_device
        from prism_deco.evaluation.choose import prepare_one

        if self.relevance:
            # A fault in these questions shows before the time that the scores take.
            prepare_one(self.relevance, self._relevance_options(), root=own_benchmarks(folder), boxes=True)
        with world.patient():
            if self.benchmarks:
                more = {"asks": self._asks, "batch_size": self.keys["batch_size"]}
                # First as in training, then with each other number of tokens. Each loads the model anew.
                for tokens in (Tokens(), *self.fewer_tokens):
                    score_run(folder, self.benchmarks, self._options, self.own, world=world, tokens=tokens, **more)
            if self.relevance and world.is_main:  # one process writes its files
                device = local_device(self.accelerator)
                measure_relevance(folder, self.relevance, self._relevance_options(), device=device)
            # The other ranks wait until the maps are written.
            world.barrier()

    @property
    def _asks(self) -> list[str]:
        return resolve_asks(self.keys["ask"])

    @property
    def fewer_tokens(self) -> list[Tokens]:
        """Other visual tokens to score with, besides those of the training."""
        # No compressor (None) leaves the number to the projector.
        compressors = self.keys["compressors"] or {None: {}}
        return [Tokens(n, name, own) for n in self.keys["num_tokens"] for name, own in compressors.items()]

    @property
    def _options(self) -> dict[str, Any]:
        """Keys of all benchmarks."""
        return {"split": self.keys["split"], "limit": self.keys["limit"]}

    def _relevance_options(self) -> dict[str, Any]:
        own = self.own.get(choice_name(self.relevance or ""), {})
        # The maps have a limit of their own, which replaces that of the scores.
        return {**self._options, **own, "limit": self.keys["relevance_limit"]}

    def _split(self, choice: str) -> str | None:
        return self.own.get(choice_name(choice), {}).get("split", self.keys["split"])


def _scoring(config: DictConfig) -> _Scoring | None:
    """The scoring that a configuration asks for; None if it asks for none."""
    if not (config.evaluate.benchmarks or config.evaluate.relevance):
        return None
    benchmarks = tuple(resolve_benchmarks(config.evaluate.benchmarks or ""))
    keys: Any = OmegaConf.to_container(config.evaluate)
    of_groups = group_keys(config.evaluate.benchmarks or "")
    chosen: Any = OmegaConf.to_container(config.benchmark)
    # The configuration's keys of a benchmark win over those of its group.
    own = {name: of_groups.get(name, {}) | chosen.get(name, {}) for name in of_groups | chosen}
    llm: Any = OmegaConf.to_container(config.llm, resolve=True)
    scoring = _Scoring(benchmarks, keys["relevance"], keys, own, llm, config.trainer.accelerator)
    for tokens in scoring.fewer_tokens:
        tokens.check(config)
    return scoring


def _check(stages: Sequence[Stage], config: DictConfig, *, overwrite: bool, force: bool) -> int:
    from prism_deco.distributed import World
    from prism_deco.training.preconditions import check_all
    from prism_deco.training.run_dir import find_run, run_folder

    # Earlier stages by run folder: a stage that starts from one is checked against its configuration, since the folder
    # may not exist yet.
    before: dict[str, DictConfig] = {}
    for name, its in [(f"Stage {stage.name}: ", stage.config) for stage in stages] or [("", config)]:
        after = before.get(its.recipe.start_from)
        try:
            found = find_run(its, overwrite=overwrite)
            if found.state == "train":
                world, resume = World.of(its.trainer), found.checkpoint
                check_all(its, world, scoring=_scoring(its), resume=resume, after=after, plans=True, force=force)
        except UsageError as error:
            raise UsageError(f"{name}{error}") from error
        log.info("%sno problem found", name)
        before[str(run_folder(its))] = its
    return 0
