"""Locates a tower's weights and loads them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from prism_deco.backbones.layouts import recognise, split_vision, to_open_clip, to_timm
from prism_deco.backbones.trunks import OpenClipTrunk, Trunk
from prism_deco.config import load_choice
from prism_deco.errors import UsageError
from prism_deco.tensors import indexed_files, open_tensors, tensor_files

log = logging.getLogger(__name__)

ASSETS = Path(__file__).parents[1] / "assets" / "towers"
ASSET = "asset:"
"""Prefix of a `weights` value that names a file in `ASSETS`."""


def check_tower_weights(choice: str | Mapping[str, Any]) -> None:
    """`UsageError` if the weights of a backbone choice are neither on this machine nor available from the hub."""
    content = load_choice("backbone", choice) if isinstance(choice, str) else choice
    if not content.get("pretrained", True):
        return
    for tower in content.get("towers") or ():
        check_tower_weights(tower)
    if "hub" in content:
        place = [content.get(key) for key in ("weights", "hub", "file", "file_gb")]
        locate(content["name"], *place, dry_run=True)


def locate(
    name: str,
    weights: str | None,
    hub: str | None,
    file: str | None,
    file_gb: float | None,
    *,
    dry_run: bool = False,
) -> Path:
    """The file or folder with a tower's weights.

    Args:
        name: the tower, for messages.
        weights, hub, file, file_gb: see `Tower`.
        dry_run: only check that the file can be downloaded.

    Raises:
        UsageError: it is missing and cannot be downloaded.
    """
    hint = (
        "Point at a local file or folder with backbone.weights=PATH (open_clip, timm and Hugging Face layouts are "
        "read), or start from random weights with backbone.pretrained=false."
    )
    if weights is not None:
        is_asset = weights.startswith(ASSET)
        path = ASSETS / f"{weights.removeprefix(ASSET)}.safetensors" if is_asset else Path(weights).expanduser()
        if not path.exists():
            raise UsageError(f"There are no weights of {name} at {path}. {hint}")
        return path
    if hub is None or file is None:
        raise UsageError(f"The backbone {name} sets neither `weights` nor a `hub` repository with a `file`. {hint}")
    cached = try_to_load_from_cache(hub, file)
    if isinstance(cached, str):
        return Path(cached)
    size = f" (about {file_gb:g} GB)" if file_gb else ""
    try:
        if dry_run:
            return Path(hf_hub_download(hub, file, dry_run=True).local_path)
        log.info("%s: fetching %s%s from https://huggingface.co/%s", name, file, size, hub)
        return Path(hf_hub_download(hub, file))
    except (OSError, HfHubHTTPError) as error:
        # Lines after the first suggest options of huggingface_hub.
        reason = (str(error.__cause__ or error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"{name} needs the file {file}{size} of https://huggingface.co/{hub}: it is not in the local cache and "
            f"could not be downloaded ({reason}). {hint}"
        ) from error


def load_trunk(trunk: Trunk, path: Path, name: str, device: torch.device) -> None:
    """Loads weights of any known layout into a trunk built on the meta device, as float32.

    The position table is resampled to the trunk's grid (bicubic, antialiased).

    Raises:
        UsageError: the file cannot be read, a folder holds several models, the layout is unknown, keys are missing or
            unexpected, or shapes differ.
    """
    files = tensor_files(path)
    if not files or (len(files) > 1 and not indexed_files(path)):
        names = ", ".join(file.name for file in files) or "none"
        raise UsageError(f"{path}: expected one weight file in the folder and found {names}. Name the file itself.")
    where = {key: file for file in files for key in open_tensors(file)}
    vision, stray = split_vision(where)
    layout = recognise(vision)
    if layout is None:
        raise UsageError(
            f"{path}: the keys match no known vision tower (open_clip, timm, Hugging Face CLIP, SigLIP or "
            f"DINOv2). The first are: {', '.join(sorted(where)[:5])}."
        )
    log.info("%s: reading %s weights from %s", name, layout.name, path)
    state: dict[str, Tensor] = {}
    for file in files:
        tensors = open_tensors(file)
        state |= {key: tensors[source] for key, source in vision.items() if where[source] == file}
    state = {key: value.float() for key, value in to_timm(state, layout, trunk.taps[-1], trunk.depth).items()}
    if "pos_embed" in state and ("cls_token" in state or not trunk.prefix_positions):
        _fit_positions(state, trunk, path)
    if isinstance(trunk, OpenClipTrunk):
        state = to_open_clip(state)
    _check(state, trunk, stray, f"{path} ({layout.name} layout) does not fit the tower {name}")
    trunk.vit.load_state_dict({key: value.to(device) for key, value in state.items()}, assign=True)


def _fit_positions(state: dict[str, Tensor], trunk: Trunk, path: Path) -> None:
    table = state["pos_embed"]
    prefix = trunk.prefix_positions
    if not prefix and "cls_token" in state and math.isqrt(table.shape[1] - 1) ** 2 == table.shape[1] - 1:
        # The DINOv2 release and the Hugging Face port give the class token a position; timm has already added it.
        state["cls_token"] = state["cls_token"] + table[:, :1]
        table = table[:, 1:]
    side = math.isqrt(table.shape[1] - prefix)
    if side * side != table.shape[1] - prefix:
        raise UsageError(f"{path}: the position table of {table.shape[1]} rows does not fit a square patch grid.")
    if (side, side) != trunk.grid:
        log.info("resampling the position table from %dx%d to %dx%d", side, side, *trunk.grid)
        table = resample_abs_pos_embed(
            table, new_size=list(trunk.grid), old_size=[side, side], num_prefix_tokens=prefix, antialias=True
        )
    state["pos_embed"] = table.contiguous()


def _check(state: dict[str, Tensor], trunk: Trunk, stray: list[str], message: str) -> None:
    own = trunk.vit.state_dict()
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own] + stray,
        "of the wrong shape": [
            f"{key} {list(state[key].shape)} instead of {list(value.shape)}"
            for key, value in own.items()
            if key in state and state[key].shape != value.shape
        ],
    }
    found = [f"{kind}: {', '.join(names[:8])}{' ...' * (len(names) > 8)}" for kind, names in problems.items() if names]
    if found:
        raise UsageError(f"{message}. Weights {'; '.join(found)}. Is it the file of another model?")
