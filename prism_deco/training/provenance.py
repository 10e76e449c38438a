"""What a checkpoint says about itself: which run it belongs to, and what that run was trained on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prism_deco.config import default_run_id
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

_SOURCES = {
    "train": "the training records",
    "val": "the validation records",
    "backbone": "the weights of the backbone",
    "llm": "the weights of the language model",
    "start_from": "the model of recipe.start_from",
}


@dataclass(frozen=True)
class Provenance:
    """Kept in every checkpoint of a run.

    Attributes:
        run: `run_id`, and the `choices` it was composed of.
        inputs: SHA-256 of what is read from outside, by the names in `_SOURCES`.
        changes: where an input was another one from some step on, which the user accepted.
    """

    run: dict[str, str]
    inputs: dict[str, str]
    changes: list[dict[str, Any]]

    @property
    def content(self) -> dict[str, Any]:
        """As JSON."""
        return {"run": self.run, "inputs": self.inputs, "input_changes": self.changes}


def check_owner(checkpoint: Checkpoint, config: DictConfig) -> None:
    """`UsageError` if a checkpoint belongs to another run. Earlier versions did not record it."""
    recorded = checkpoint.content.get("run")
    if recorded not in (None, _run(config)):
        raise UsageError(
            f"{checkpoint.folder} belongs to run {recorded['run_id']} ({recorded['choices']}), not to {config.run_id} "
            f"({default_run_id(config)}). Remove this checkpoint's folder."
        )


def find_provenance(
    config: DictConfig,
    vlm: VLM,
    llm: LanguageModel,
    data: Conversations,
    start: Path | None,
    resume: Checkpoint | None,
) -> Provenance:
    """What the run is trained on now; before weights are sharded.

    Args:
        start: the model folder that it starts from, if any.
        resume: the checkpoint it continues from.

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
        listed = " and ".join(_SOURCES[name] for name in changed)
        if not config.trainer.accept_changed_inputs:
            raise UsageError(
                f"{listed[0].upper()}{listed[1:]} changed since {resume.folder.name} of this run. Restore the earlier "
                "files, start another run (run_id=NAME), or accept the change with trainer.accept_changed_inputs=true; "
                "manifest.json then records it."
            )
        log.warning("Continuing although %s changed since %s", listed, resume.folder.name)
        for name in changed:
            changes.append({"step": resume.step, "input": name, "before": before[name], "after": inputs[name]})
    return Provenance(_run(config), inputs, changes)


def _run(config: DictConfig) -> dict[str, str]:
    return {"run_id": config.run_id, "choices": default_run_id(config)}
