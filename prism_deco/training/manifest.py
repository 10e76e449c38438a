"""Provenance of a run: the inputs that its checkpoints record, and `manifest.json`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
from collections.abc import Collection, Iterable, Mapping
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
from prism_deco.training.datamodule import Conversations
from prism_deco.training.model_folder import SUMS
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

PACKAGES = ("torch", "transformers", "pytorch-lightning", "timm", "open_clip_torch", "omegaconf", "tokenizers", "numpy")

_INPUTS = {
    "train": "the training records",
    "val": "the validation records",
    "tokenizer": "the tokenizer",
    "backbone": "the weights of the backbone",
    "llm": "the weights of the language model",
    "start_from": "the model of recipe.start_from",
}


def check_owner(checkpoint: Checkpoint, config: DictConfig) -> None:
    """`UsageError` if a checkpoint belongs to another run."""
    recorded = checkpoint.content.get("run")
    if recorded is None:  # written by an earlier version
        return
    own = _run(config)
    if any(recorded[key] != own[key] for key in ("run_id", "choices")):
        raise UsageError(
            f"{checkpoint.folder} belongs to run {recorded['run_id']} ({recorded['choices']}), not to {own['run_id']} "
            f"({own['choices']}). Remove this checkpoint's folder."
        )
    differing = []
    for key, value in recorded.get("settings", {}).items():
        if value != own["settings"].get(key, value):  # versions differ in their keys
            differing.append(f"{key} is {value!r} there and {own['settings'][key]!r} here")
    if differing:
        raise UsageError(
            f"{checkpoint.folder} belongs to another run named {own['run_id']}: {'; '.join(differing[:5])}. Remove "
            "this checkpoint's folder."
        )


def provenance(
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    data: Conversations,
    start: Path | None,
    resume: Checkpoint | None,
) -> dict[str, Any]:
    """The description of a run that each of its checkpoints stores, as JSON. Weights must not be sharded yet.

    Args:
        start: the model folder that the run starts from, if any.
        resume: the checkpoint that it resumes from, if any.

    Returns:
        run: its `run_id`, the `choices` that it is composed of, and the `settings` that must not change on resuming.
        inputs: SHA-256 of its inputs, by the names in `_INPUTS`.
        input_changes: inputs that changed at some step, as accepted by the user.

    Raises:
        UsageError: an input changed, and `trainer.accept_changed_inputs` is not set.
    """
    inputs = _read_for_examples(data, llm) | {"backbone": vlm.backbone.sha256()}
    if config.llm.pretrained and not tuning(config.recipe.lm).base:
        inputs["llm"] = weights_record(llm.spec)["sha256"]  # frozen, so checkpoints do not contain them
    if start is not None and (start / SUMS).is_file():
        inputs["start_from"] = file_sha256(start / SUMS)
    changes: list[dict[str, Any]] = list(resume.content.get("input_changes", [])) if resume else []
    if resume and (changed := _changed(inputs, resume, config)):
        log.warning("Continuing although %s changed since %s", _listed(changed), resume.folder.name)
        before = resume.content["inputs"]
        for name in changed:
            changes.append({"step": resume.step, "input": name, "before": before[name], "after": inputs[name]})
    return {"run": _run(config), "inputs": inputs, "input_changes": changes}


def check_resume(checkpoint: Checkpoint, config: DictConfig, llm: LanguageModel, data: Conversations) -> None:
    """Checks what `provenance` checks, except for weights. Does not need those of the model."""
    check_owner(checkpoint, config)
    _changed(_read_for_examples(data, llm), checkpoint, config)


def _read_for_examples(data: Conversations, llm: LanguageModel) -> dict[str, str]:
    """SHA-256 of the records and of the tokenizer's rules."""
    backend = getattr(llm.tokenizer, "backend_tokenizer", None)
    rules = llm.tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    rules |= {"truncation": None, "padding": None}  # left over from the tokenizer's last call
    tokenizer = hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
    return {"train": data.data_hash, "val": data.val_hash, "tokenizer": tokenizer}


def _changed(inputs: Mapping[str, str], resume: Checkpoint, config: DictConfig) -> list[str]:
    """The inputs that changed since the checkpoint; `UsageError` unless the user accepts that."""
    before: Mapping[str, str] = resume.content.get("inputs", {})
    changed = [name for name in inputs if before.get(name, inputs[name]) != inputs[name]]
    if changed and not config.trainer.accept_changed_inputs:
        listed = _listed(changed)
        raise UsageError(
            f"{listed[0].upper()}{listed[1:]} changed since {resume.folder.name} of this run. Restore the earlier "
            "files, start another run (run_id=NAME), or accept the change with trainer.accept_changed_inputs=true; "
            "manifest.json then records it."
        )
    return changed


def _listed(inputs: Iterable[str]) -> str:
    return " and ".join(_INPUTS[name] for name in inputs)


def build_manifest(
    config: DictConfig,
    vlm: VLM,
    data: Conversations,
    counts: Mapping[str, int],
    bad_rows: Collection[int],
    **measured: Any,
) -> dict[str, Any]:
    """The content of `manifest.json`.

    Args:
        counts, bad_rows: those of the `TrainingModule`.
        measured: further entries.
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
        "records": len(records) - len(bad_rows),
        "records_with_images": int(np.count_nonzero(np.delete(records.has_image, list(bad_rows)))),
        "bad_records": len(data.left_out) + counts["bad_records"],
        "bad_images": counts["bad_images"],
        "text_tokens_cut": counts["tokens_cut"],
        "steps_skipped": counts["steps_skipped"],
        "benchmarks": str(data.benchmarks) if data.benchmarks else None,
        **measured,
    }


def config_hash(config: DictConfig) -> str:
    """SHA-256 of the resolved configuration, without `run_id` and `runs_dir`."""
    content = OmegaConf.to_container(config, resolve=True)
    assert isinstance(content, dict)
    content = {key: value for key, value in content.items() if key not in ("run_id", "runs_dir")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """The package's version; in a git checkout, with the commit."""
    folder = Path(prism_deco.__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return prism_deco.__version__
    return f"{prism_deco.__version__}+{commit}"


def _run(config: DictConfig) -> dict[str, Any]:
    # Paths change when a run moves to another machine; the files there are compared by their hashes.
    fixed = {key: value for key, value in flat(config).items() if not is_free(key) and "/" not in str(value)}
    settings = {key: value for key, value in fixed.items() if key != "run_id"}
    return {"run_id": config.run_id, "choices": default_run_id(config), "settings": settings}
