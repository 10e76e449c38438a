"""What a run was made from: the inputs that its checkpoints name, and `manifest.json`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

import prism_deco
from prism_deco.config import default_run_id, flat, is_free
from prism_deco.errors import UsageError
from prism_deco.files import file_sha256
from prism_deco.llms import LanguageModel
from prism_deco.llms.build import weights_record
from prism_deco.llms.tuning import tuning
from prism_deco.training.checkpoints import Checkpoint
from prism_deco.training.checksums import SUMS
from prism_deco.training.datamodule import Conversations
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "pytorch-lightning", "timm", "open_clip_torch", "omegaconf", "tokenizers", "numpy")

_INPUTS = {
    "train": "the training records",
    "val": "the validation records",
    "backbone": "the weights of the backbone",
    "llm": "the weights of the language model",
    "start_from": "the model of recipe.start_from",
}


def check_owner(checkpoint: Checkpoint, config: DictConfig) -> None:
    """`UsageError` if a checkpoint belongs to another run. Earlier versions did not record it, or not its settings."""
    recorded, own = checkpoint.content.get("run"), _run(config)
    if recorded is None:
        return
    # Only what both versions know: keys come and go.
    theirs, ours = recorded.get("settings", {}), own["settings"]
    differing = [f"{key}={theirs[key]}" for key in sorted(theirs.keys() & ours.keys()) if theirs[key] != ours[key]]
    if differing or any(recorded[key] != own[key] for key in ("run_id", "choices")):
        listed = ", ".join([recorded["choices"], *differing[:5]])
        raise UsageError(
            f"{checkpoint.folder} belongs to run {recorded['run_id']} ({listed}), not to {config.run_id} "
            f"({default_run_id(config)}). Remove this checkpoint's folder."
        )


def provenance(
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    data: Conversations,
    start: Path | None,
    resume: Checkpoint | None,
) -> dict[str, Any]:
    """What each checkpoint of a run says about it, as JSON; before weights are sharded.

    Args:
        start: the model folder that it starts from, if any.
        resume: the checkpoint it continues from.

    Returns:
        run: its `run_id`, the `choices` it was composed of, and the `settings` that it cannot change on the way.
        inputs: SHA-256 of what is read from outside, by the names in `_INPUTS`.
        input_changes: where an input was another one from some step on, which the user accepted.

    Raises:
        UsageError: an input is another one than before, and `trainer.accept_changed_inputs` is not set.
    """
    inputs = {"train": data.data_hash, "val": data.val_hash, "backbone": vlm.backbone.sha256()}
    if config.llm.pretrained and not tuning(config.recipe.lm).base:
        inputs["llm"] = weights_record(llm.spec)["sha256"]  # frozen: checkpoints do not hold them
    if start is not None and (start / SUMS).is_file():
        inputs["start_from"] = file_sha256(start / SUMS)
    before: Mapping[str, str] = resume.content.get("inputs", {}) if resume else {}
    changes: list[dict[str, Any]] = list(resume.content.get("input_changes", [])) if resume else []
    changed = [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]
    if resume and changed:
        listed = " and ".join(_INPUTS[name] for name in changed)
        if not config.trainer.accept_changed_inputs:
            raise UsageError(
                f"{listed[0].upper()}{listed[1:]} changed since {resume.folder.name} of this run. Restore the earlier "
                "files, start another run (run_id=NAME), or accept the change with trainer.accept_changed_inputs=true; "
                "manifest.json then records it."
            )
        log.warning("Continuing although %s changed since %s", listed, resume.folder.name)
        for name in changed:
            changes.append({"step": resume.step, "input": name, "before": before[name], "after": inputs[name]})
    return {"run": _run(config), "inputs": inputs, "input_changes": changes}


def build_manifest(
    config: DictConfig, vlm: VLM, data: Conversations, counts: Mapping[str, int], **measured: Any
) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
        counts: what the training counted (`TrainingModule.counts`).
        measured: what else only the finished run knows.
    """
    parameters = list(vlm.parameters())
    records = data.train_records
    return {
        "run_id": config.run_id,
        "seed": config.seed,
        "config_hash": config_hash(config),
        "data_hash": data.data_hash,
        "code_version": code_version(),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "machine": {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()},
        "params": {
            "total": sum(p.numel() for p in parameters),
            "trained": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "tokens": {"visual_in": vlm.backbone.num_patches, "visual_out": vlm.projector.num_tokens},
        "steps": data.total_steps,
        "samples": min(data.total_steps * config.recipe.global_batch_size, len(records) * config.recipe.epochs),
        "records": len(records),
        "records_with_images": int(np.count_nonzero(records.has_image)),
        "bad_records": len(data.left_out) + counts["bad_records"],
        "bad_images": counts["bad_images"],
        "text_tokens_cut": counts["tokens_cut"],
        "steps_skipped": counts["steps_skipped"],
        "benchmarks": str(data.benchmarks) if data.benchmarks else None,
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


def _run(config: DictConfig) -> dict[str, Any]:
    settings = {key: value for key, value in flat(config).items() if not is_free(key) and key != "run_id"}
    return {"run_id": config.run_id, "choices": default_run_id(config), "settings": settings}
