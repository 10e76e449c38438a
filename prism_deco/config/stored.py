"""The `config.yaml` of a run or an export: plain values, which nothing resolves and whose plug-ins nobody imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from prism_deco.config.compose import compose
from prism_deco.config.keys import RETIRED
from prism_deco.config.parse import read_yaml
from prism_deco.errors import UsageError
from prism_deco.files import write_whole

CONFIG = "config.yaml"

_FREE = ("trainer", "benchmark", "recipe.micro_batch_size", "data.num_workers", "runs_dir")


def is_free(key: str) -> bool:
    """Whether an unfinished run may continue under another value of a key, or group: it says where and how the run is
    computed, not what is learned (except for rounding; see `training.run_dir`)."""
    return key in _FREE or key.startswith(("trainer.", "evaluate.", "benchmark."))


def save_config(config: DictConfig, path: Path) -> None:
    """Writes the composed configuration, references resolved."""
    write_whole(path, OmegaConf.to_yaml(config, resolve=True))


def read_config(path: Path) -> DictConfig:
    """Reads what `save_config` wrote; keys that it does not hold are at their defaults. Ranges are not checked again.

    Raises:
        UsageError: as for `read_stored`, or the schema does not take it.
    """
    return compose(read_stored(path))


def read_stored(path: Path) -> dict[str, Any]:
    """What `save_config` wrote, as it stands in the file; retired keys are left out.

    Raises:
        UsageError: there is no such file, or it is not a stored configuration of plain values.
    """
    if not path.is_file():
        raise UsageError(f"{path} does not exist: {path.parent} is not a run folder.")
    content = read_yaml(path)
    _refuse_references(content, path)
    for key in RETIRED:
        name, _, value = key.partition("=")
        group, _, leaf = name.rpartition(".")
        if leaf in content.get(group, {}) and value in ("", content[group][leaf]):
            del content[group][leaf]
    return content


def _refuse_references(content: Any, path: Path, key: str = "") -> None:
    """The folder may be somebody else's: `${oc.env:NAME}` would put a secret of this machine into the model's card."""
    if isinstance(content, dict):
        for name, value in content.items():
            _refuse_references(value, path, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for value in content:
            _refuse_references(value, path, key)
    elif isinstance(content, str) and "${" in content:
        raise UsageError(
            f"{path}: {key} is a reference ({content}). A stored configuration has plain values only. References are "
            "for YAML files of your own, under another name than config.yaml."
        )
