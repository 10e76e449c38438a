"""Starting from an earlier run: the second stage of LLaVA-1.5 takes over the projector of the first, and a finished
model is trained further on other data."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from prism_deco.build import group
from prism_deco.config import read_config
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel
from prism_deco.llms.build import weights_record
from prism_deco.llms.lora import base_name, fill_lora, is_adapter
from prism_deco.llms.tuning import tuning
from prism_deco.tensors import all_finite, open_safetensors
from prism_deco.training.model_folder import ADAPTER, BASE_RECORD, CONFIG, TOWER, TOWER_RECORD, WEIGHTS, load_strict
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

SHARED = {
    "backbone": ("resize", "weights"),
    "projector": ("weights",),
    "llm": ("hub", "revision", "weights", "tokenizer", "dtype", "attention", "tokenize"),
}
"""The groups that both runs must agree in, without the keys that may differ: they say how an image is cropped, where
weights come from (their hashes are compared) and how the LLM computes."""

FEATURES = ("standardise_features", "token_scale")
"""Keys of the recipe that change what a projector gets and gives."""


def start_from(run: Path, config: DictConfig, vlm: VLM, llm: LanguageModel) -> None:
    """Takes over what a finished run has trained (projector, LLM or adapters), and whatever of it is random elsewhere
    (tower, LLM).

    Args:
        run: a run folder, or its `model/`.
        config: of the run that starts.
        vlm: its model, whole and on the CPU; adapters may be there already.

    Raises:
        UsageError: there is no finished run, its files are damaged, or it is one of another projector, backbone or LLM.
    """
    folder = find_start(run, config)
    earlier = tuning(read_config(folder / CONFIG).recipe.lm)
    if config.backbone.pretrained:
        _check("backbone.weights", run, _sha256(folder / TOWER_RECORD), vlm.backbone.sha256())
    else:
        load_strict(vlm.backbone, [folder / TOWER])
    if config.llm.pretrained and not earlier.base:
        _check("llm.weights", run, _sha256(folder / BASE_RECORD), weights_record(llm.spec)["sha256"])
    taken = {"projector.": "projector", "feature_": "feature statistics"}
    if takes_llm(folder, config):
        taken["lm."] = "LLM"
    log.info(
        "Starting from the %s of %s", ", ".join([*taken.values(), *(["adapters"] if earlier.adapters else [])]), run
    )
    _copy(folder / WEIGHTS, vlm, tuple(taken))
    if earlier.adapters:
        fill_lora(vlm.lm, folder / ADAPTER)


def takes_llm(folder: Path, config: DictConfig) -> bool:
    """Whether the LLM's own weights come from the model that the run starts from."""
    return not config.llm.pretrained or tuning(read_config(folder / CONFIG).recipe.lm).base


def find_start(run: Path, config: DictConfig) -> Path:
    """The `model/` folder of the run to start from, by what can be said before a model is built.

    Raises:
        UsageError: as for `start_from`, but for weights that differ.
    """
    folder = run / "model" if (run / "model").is_dir() else run
    if not (folder / WEIGHTS).is_file():
        raise UsageError(f"recipe.start_from={run} holds no finished model: train that run first.")
    check_start(read_config(folder / CONFIG), config)
    return folder


def check_start(earlier: DictConfig, config: DictConfig) -> None:
    """`UsageError` if the earlier run, which the configuration starts from, is one of another model, or one whose LLM
    would be lost."""
    run, way, now = config.recipe.start_from, tuning(earlier.recipe.lm), tuning(config.recipe.lm)
    differing = _differing(earlier, config)
    if differing:
        listed = "; ".join(f"{key} is {theirs!r} there and {ours!r} here" for key, theirs, ours in differing[:5])
        raise UsageError(f"recipe.start_from={run} is a run of another model: {listed}. Start from one of the same.")
    if way.adapters:
        keys = ("lm", "lora_r", "lora_alpha")
        if any(earlier.recipe[key] != config.recipe[key] for key in keys):
            same = " ".join(f"recipe.{key}={earlier.recipe[key]}" for key in keys)
            raise UsageError(f"recipe.start_from={run} trains adapters: only a run with {same} can continue them.")
    if way.base and config.llm.pretrained and not now.base:
        raise UsageError(
            f"recipe.start_from={run} trains the whole LLM, which a run with recipe.lm={config.recipe.lm} would not "
            "store: set recipe.lm=full, or start from a run that leaves the LLM alone (recipe.lm=frozen)."
        )


def _differing(earlier: DictConfig, now: DictConfig) -> list[tuple[str, Any, Any]]:
    """(key, value there, value here) of what the runs must agree in and do not."""
    differing = []
    for name, free in SHARED.items():
        theirs, ours = group(earlier, name), group(now, name)
        for key in sorted((theirs | ours).keys() - set(free)):
            if theirs.get(key) != ours.get(key):
                differing.append((f"{name}.{key}", theirs.get(key), ours.get(key)))
    for key in FEATURES:
        if earlier.recipe[key] != now.recipe[key]:
            differing.append((f"recipe.{key}", earlier.recipe[key], now.recipe[key]))
    # The name of the choice says most, settings follow from it.
    return sorted(differing, key=lambda difference: not difference[0].endswith(".name"))


def _sha256(record: Path) -> str:
    return json.loads(record.read_text(encoding="utf-8"))["sha256"]


def _check(key: str, run: Path, theirs: str, ours: str) -> None:
    if theirs != ours:
        raise UsageError(
            f"recipe.start_from={run} was trained with weights of SHA-256 {theirs[:12]}…, the ones here have "
            f"{ours[:12]}…: point {key} at the same files."
        )


@torch.no_grad()
def _copy(file: Path, vlm: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Copies the file's tensors of these prefixes into the model's own, whose adapters stay as they are."""
    own = {base_name(name): tensor for name, tensor in vlm.state_dict().items() if not is_adapter(name)}
    with open_safetensors(file) as tensors:
        names = [name for name in tensors.keys() if name.startswith(prefixes)]  # noqa: SIM118  # no mapping
        wrong = [name for name in names if name not in own or own[name].shape != tensors.get_tensor(name).shape]
        # Tied tables are stored once.
        found = {own[name].data_ptr() for name in names if name in own}
        wrong += [n for n, t in own.items() if n.startswith(prefixes) and t.numel() and t.data_ptr() not in found]
        if wrong:
            raise UsageError(f"{file} does not fit the model: {wrong[0]} ({len(wrong)} in all).")
        for name in names:
            stored = tensors.get_tensor(name)
            if not all_finite(stored):
                raise UsageError(f"{file}: {name} holds NaN or infinite numbers. Start from another run.")
            own[name].copy_(stored)
