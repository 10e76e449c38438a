"""Recorded scores of models trained without their images, the baselines of models that see them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from prism_deco.config import load_choice
from prism_deco.config.schema import Config
from prism_deco.errors import UsageError

REFERENCE = Path(__file__).parent.parent / "assets" / "reference" / "blind.json"

IGNORED = {
    ("data", "statistics"),
    *(
        ("recipe", key)
        for key in (
            "blind",
            "num_tokens",
            "projector_lr",
            "token_scale",
            "standardise_features",
            "resize",
            "start_from",
        )
    ),
}
"""Settings that do not change an image-blind model."""


def settings_key(config: DictConfig) -> str:
    """Identifies the settings that a model must share with its image-blind baseline: the LLM, the data and the recipe.

    What only concerns the image (backbone, projector, their learning rate and token count) is left out, since a blind
    model does not use it; so are settings at the schema's default, so that the references recorded before a setting was
    added stay valid.
    """
    content = OmegaConf.to_container(config, resolve=True)
    defaults = OmegaConf.to_container(OmegaConf.structured(Config), throw_on_missing=False)
    assert isinstance(content, dict) and isinstance(defaults, dict)
    shared = {}
    for group in ("llm", "data", "recipe"):
        own = {key: value for key, value in content[group].items() if value != defaults[group].get(key, ...)}
        shared[group] = {key: value for key, value in own.items() if (group, key) not in IGNORED}
    return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


def blind_scores(config: DictConfig, split: str | None) -> dict[str, float] | None:
    """Primary score by benchmark of the image-blind baseline of these settings; None where none was recorded.

    Args:
        split: the split scored; None is each benchmark's own.
    """
    if not REFERENCE.is_file():
        return None
    entry = json.loads(REFERENCE.read_text(encoding="utf-8")).get(settings_key(config))
    if entry is None or split is not None:
        return entry and entry["scores"].get(split)
    recorded = [(name, part) for part, values in entry["scores"].items() for name in values]
    return {name: entry["scores"][part][name] for name, part in recorded if part == _own_split(name)} or None


def _own_split(benchmark: str) -> str:
    """The split that a benchmark is scored on when none is asked for; `own` where it has no splits."""
    try:
        return load_choice("benchmark", benchmark).get("split") or "own"
    except UsageError:  # a YAML of one's own, which is not found by its name alone
        return "own"
