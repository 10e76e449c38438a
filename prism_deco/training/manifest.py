"""The record of a run: what went in, with which versions, and how far it got."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import prism_deco
from prism_deco.vlm import VLM

PACKAGES = ("torch", "transformers", "pytorch-lightning", "timm", "open_clip_torch", "omegaconf", "tokenizers", "numpy")


def build_manifest(config: DictConfig, vlm: VLM, *, data_hash: str, **measured: Any) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
        measured: what only the finished run knows (steps, samples, bad_images, ...).
    """
    parameters = list(vlm.parameters())
    return {
        "run_id": config.run_id,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "data_hash": data_hash,
        "code_version": code_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "params": {
            "total": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "tokens": {"visual_in": vlm.backbone.num_patches, "visual_out": vlm.projector.num_tokens},
        **measured,
    }


def config_hash(config: DictConfig) -> str:
    """SHA-256 of the resolved configuration without the run's name and place."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    content = {key: value for key, value in content.items() if key not in ("run_id", "runs_dir")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """The package's version, with the commit where the code is a git checkout."""
    folder = Path(prism_deco.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return prism_deco.__version__
    return f"{prism_deco.__version__}+{commit}"
