"""Trained runs as models of other tools."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """The manifest that lmms-eval loads from entry points of the group `lmms_eval.models`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("prism_deco", simple_class_path="prism_deco.integrations.lmms_eval.PrismDeco")
