"""The built-in data families: the user's own files, published data sets, data sets on the hub, and mixtures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_deco.config import compose, load_choice
from prism_deco.config.compose import set_key
from prism_deco.config.registry import unknown
from prism_deco.data.base import SOURCES, Source, build_source
from prism_deco.data.hub import list_files
from prism_deco.data.packing import table_files
from prism_deco.errors import UsageError

MOST = 1000
"""The largest weight in a mixture."""


@SOURCES.register("llava")
def llava(json: str | None, image_root: str | None, val_json: str | None = None) -> Source:
    """The user's own JSON files and image folder; `UsageError` names the one that cannot be read."""
    if json is None or image_root is None:
        raise UsageError("data=llava needs data.json=FILE and data.image_root=FOLDER.")
    _check_readable("data.json", Path(json), "file")
    if val_json:
        _check_readable("data.val_json", Path(val_json), "file")
    _check_readable("data.image_root", Path(image_root), "folder")
    return Source(Path(json), Path(image_root), Path(val_json) if val_json else None)


@SOURCES.register("embedded")
def embedded(path: str | None, val_path: str | None = None) -> Source:
    """The user's own Parquet or Arrow files; `UsageError` if there are none."""
    if path is None:
        raise UsageError("data=embedded needs data.path=FOLDER (or a .parquet or .arrow file, or a pattern of such).")
    for key, value in (("data.path", path), ("data.val_path", val_path)):
        if value is None:
            continue
        try:
            files = table_files(Path(value))
        except OSError as error:
            raise UsageError(f"{key}={value} cannot be read ({error.strerror}).") from error
        if not files and "*" not in value and not os.path.lexists(value):
            raise UsageError(f"{key}={value}: there is no such file or folder.")
        if not files:
            raise UsageError(
                f"{key}={value}: there is no .parquet or .arrow file. JSON is read by data=llava data.json=FILE."
            )
    return Source(Path(path), None, Path(val_path) if val_path else None)


@SOURCES.register("published")
def published(root: str | None, json: str, image_root: str, **_: Any) -> Source:
    """The files in the data set's folder. The other keys of the YAML say where to download them."""
    if root is None:
        raise UsageError("Name the data set's folder: data.root=FOLDER (`prism-deco data prepare` fills it).")
    train = Path(root) / json
    if not os.path.exists(train):
        raise UsageError(f"{train} does not exist: run `prism-deco data prepare` with --root {root} first.")
    _check_readable("data.root", train, "file")
    return Source(train, Path(root) / image_root)


@SOURCES.register("hub")
def hub(repo: str | None, files: str, revision: str) -> Source:
    """Parquet files of a repository on the hub; `UsageError` if there are none."""
    if repo is None:
        raise UsageError("data=hub needs data.repo=OWNER/NAME (and data.files='FOLDER/*.parquet').")
    return Source(list_files(repo, files, revision), None)


@SOURCES.register("mixture")
def mixture(mixture: Mapping[str, Any] | None) -> Source:
    """Several sources to train on together; `UsageError` names the one that is wrong."""
    if not mixture or not isinstance(mixture, Mapping):
        raise UsageError("data=mixture needs data.mixture={NAME: {data: CHOICE, weight: 1.0, KEY: VALUE ...}, ...}.")
    parts = []
    for name, part in mixture.items():
        key = f"data.mixture.{name}"
        options = dict(part) if isinstance(part, Mapping) else {}
        choice, weight = options.pop("data", None), options.pop("weight", 1.0)
        if not isinstance(choice, str) or choice == "mixture":
            raise UsageError(
                f"{key}.data={choice}: name the choice of `data` that reads it, such as llava or embedded."
            )
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MOST:
            raise UsageError(f"{key}.weight={weight}: expected a number above 0, such as 1.0, and at most {MOST}.")
        spec = load_choice("data", choice)
        config = compose({"data": spec})
        for option, value in options.items():
            if option not in spec:
                raise unknown(f"key of data={choice} in {key}", str(option), spec)
            set_key(config, f"data.{option}", value, key)
        checked: Any = OmegaConf.to_container(config.data, resolve=True)
        try:
            parts.append((build_source(checked), float(weight)))
        except UsageError as error:
            raise UsageError(f"{key}: {error}") from error
    return Source(Path(), None, mixture=tuple(parts))


def _check_readable(key: str, path: Path, kind: str) -> None:
    """Raises `UsageError`, naming the key, if a path is not a readable file or folder."""
    wanted = "the folder that contains the images" if kind == "folder" else "a JSON or JSON Lines file"
    try:
        if kind == "folder":
            os.scandir(path).close()
        else:
            path.open("rb").close()
    except FileNotFoundError as error:
        raise UsageError(f"{key}={path}: there is no such {kind}.") from error
    except OSError as error:
        raise UsageError(f"{key}={path} cannot be read as a {kind} ({error.strerror}): name {wanted}.") from error
