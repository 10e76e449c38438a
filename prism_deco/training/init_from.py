"""Starting from an earlier run (`recipe.start_from`): for the second stage of LLaVA-1.5, or to train a finished model
further."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from prism_deco.build import group
from prism_deco.config import read_config
from prism_deco.errors import UsageError
from prism_deco.files import read_json
from prism_deco.llms import LanguageModel
from prism_deco.llms.build import weights_record
from prism_deco.llms.lora import fill_lora
from prism_deco.llms.tuning import tuning
from prism_deco.training.model_folder import (
    ADAPTER,
    BASE_RECORD,
    CONFIG,
    TOWER,
    TOWER_ADAPTER,
    TOWER_RECORD,
    WEIGHTS,
    check_finite,
    load_weights,
    model_folder,
)
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

SHARED = {
    "backbone": ("resize", "weights"),
    "projector": ("weights", "init", "query_std"),
    "llm": ("hub", "revision", "weights", "tokenizer", "dtype", "attention", "tokenize"),
}
"""The groups in which both runs must agree, each with the keys that may differ: how an image is cropped, where weights
come from (their hashes are compared), how new weights are drawn, and how the LLM computes."""

FEATURES = ("standardise_features", "token_scale")
"""Keys of the recipe that change the projector's input or output, in which both runs must agree as well."""


def start_from(folder: Path, config: DictConfig, vlm: VLM, llm: LanguageModel) -> None:
    """Loads what a finished run trained (projector, LLM, tower or adapters), and its tower or LLM if not pretrained.

    Args:
        folder: the earlier run's `model/`, from `find_start`.
        config: of the run that starts.
        vlm: its model, unsharded and on the CPU; may have adapters already.

    Raises:
        UsageError: the files are damaged, or frozen weights differ from the earlier run's.
    """
    recipe = read_config(folder / CONFIG).recipe
    earlier, tower = tuning(recipe.lm), tuning(recipe.tower)
    if config.backbone.pretrained and not tower.base:
        _check_sha256("backbone.weights", folder / TOWER_RECORD, vlm.backbone.sha256())
    else:
        load_weights(vlm.backbone, [folder / TOWER])
    if config.llm.pretrained and not earlier.base:
        _check_sha256("llm.weights", folder / BASE_RECORD, weights_record(llm.spec)["sha256"])
    log.info("Starting from the model in %s", folder)
    elsewhere = ["backbone."] if takes_llm(folder, config) else ["backbone.", "lm."]
    load_weights(vlm, [folder / WEIGHTS], elsewhere=elsewhere)
    if earlier.adapters:
        fill_lora(vlm.lm, folder / ADAPTER)
    if tower.adapters:
        fill_lora(vlm.backbone, folder / TOWER_ADAPTER)
    check_finite(folder, vlm)


def takes_llm(folder: Path, config: DictConfig) -> bool:
    """Whether the LLM's base weights are loaded from the model that the run starts from."""
    return not config.llm.pretrained or tuning(read_config(folder / CONFIG).recipe.lm).base


def find_start(run: Path, config: DictConfig) -> Path:
    """The `model/` folder of the run to start from; `UsageError` if that has no finished model, or `check_start`
    fails."""
    folder = model_folder(run)
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"recipe.start_from={run} holds no finished model: train that run first.")
    check_start(read_config(folder / CONFIG), config)
    return folder


def check_start(earlier: DictConfig, config: DictConfig) -> None:
    """`UsageError` if the earlier run has another model, or if the new run would lose its trained LLM or tower."""
    run = config.recipe.start_from
    differing = _differing(earlier, config)
    if differing:
        listed = "; ".join(differing[:5])
        raise UsageError(
            f"recipe.start_from={run} is a run of another model: {listed}. Start from a run of the same model."
        )
    for key, part, name in (("lm", "llm", "LLM"), ("tower", "backbone", "tower")):
        way = tuning(earlier.recipe[key])
        keys = (key, "lora_r", "lora_alpha", *(("tower_layers",) if key == "tower" else ()))
        if way.adapters and any(earlier.recipe[k] != config.recipe[k] for k in keys):
            same = " ".join(f"recipe.{k}={earlier.recipe[k]}" for k in keys)
            raise UsageError(f"recipe.start_from={run} trains adapters: only a run with {same} can continue them.")
        if way.base and config[part].pretrained and not tuning(config.recipe[key]).base:
            raise UsageError(
                f"recipe.start_from={run} trains the whole {name}, which a run with recipe.{key}={config.recipe[key]} "
                f"does not store: set recipe.{key}=full, or start from a run that keeps the {name} frozen "
                f"(recipe.{key}=frozen)."
            )


def _differing(earlier: DictConfig, now: DictConfig) -> list[str]:
    """Describes the keys in which the runs must agree but do not."""
    pairs = {}
    for name, free in SHARED.items():
        there, here = group(earlier, name), group(now, name)
        # The name of the choice comes first: other settings follow from it.
        for key in sorted((there | here).keys() - set(free), key=lambda key: (key != "name", key)):
            pairs[f"{name}.{key}"] = (there.get(key), here.get(key))
    for key in FEATURES:
        pairs[f"recipe.{key}"] = (earlier.recipe[key], now.recipe[key])
    return [f"{key} is {there!r} there and {here!r} here" for key, (there, here) in pairs.items() if there != here]


def _check_sha256(key: str, record: Path, here: str) -> None:
    there = read_json(record, ["sha256"])["sha256"]
    if there != here:
        raise UsageError(
            f"{record.parent} was trained with weights of SHA-256 {there[:12]}…, the ones here have {here[:12]}…: "
            f"point {key} at the same files."
        )
