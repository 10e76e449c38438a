"""Records the scores of an image-blind run as the reference that tables show.

    python runs/reference/miniature/record_blind.py runs/RUN_ID --out prism_deco/assets/reference/blind.json

The run must have been trained with `recipe.blind=true` and scored. The `command` of an entry in that file trains it
again.
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prism_deco.config import GROUPS, changed_from_defaults, load_choice, read_config, shipped_choices, value_text
from prism_deco.files import write_json
from prism_deco.report.baselines import settings_key
from prism_deco.training.manifest import config_hash


def record(run: Path, path: Path) -> dict[str, Any]:
    """Adds the scores of a finished blind run to a reference file.

    Returns:
        The entry, with the command that trains the same run again.

    Raises:
        SystemExit: the run was not trained with `recipe.blind=true`, or has not been scored.
    """
    config = read_config(run / "config.yaml")
    if not config.recipe.blind:
        raise SystemExit(f"{run} was trained with its images: train a baseline with recipe.blind=true.")
    scores: dict[str, dict[str, float]] = {}
    for file in sorted((run / "eval").glob("*/metrics.json")):
        metrics = json.loads(file.read_text(encoding="utf-8"))
        benchmark = metrics["benchmark"]
        # eval/<benchmark> has the scores of the benchmark's own split, eval/<benchmark>-<split> those of another.
        split = file.parent.name.removeprefix(benchmark).removeprefix("-")
        split = split or load_choice("benchmark", benchmark).get("split") or "own"
        scores.setdefault(split, {})[benchmark] = round(metrics["metrics"][metrics["primary"]], 2)
    if not scores:
        raise SystemExit(f"{run} has no scores: run prism-deco evaluate {run} benchmark=mini")
    entry = {
        "llm": config.llm.name,
        "data": config.data.name,
        "recipe": config.recipe.name,
        "seed": config.seed,
        "command": shlex.join(["prism-deco", "train", *_overrides(config)]),
        "config_hash": config_hash(config),
        "scores": scores,
    }
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known | {settings_key(config): entry})
    return entry


def _overrides(config: DictConfig) -> list[str]:
    """The choices of a run and its overrides. A custom YAML is known only by its name."""
    shipped = shipped_choices(config)
    chosen = {group: shipped.get(group, f"{config[group].name}.yaml") for group in GROUPS}
    changed = {key: value_text(key, value) for key, value in changed_from_defaults(config).items()}
    elsewhere = ("run_id", "runs_dir")
    return [f"{key}={text}" for key, text in (chosen | changed).items() if key not in elsewhere]


def main() -> None:
    parser = argparse.ArgumentParser(description="Record the scores of an image-blind run as a reference.")
    parser.add_argument("run", type=Path, help="run folder, trained with recipe.blind=true and scored")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="reference file to add to")
    args = parser.parse_args()
    record(args.run, args.out)


if __name__ == "__main__":
    main()
