"""Trained runs inside other people's tools."""

from __future__ import annotations

from typing import Any


def lmms_eval_manifest() -> Any:
    """What lmms-eval's plugin mechanism (entry points of the group `lmms_eval.models`) asks for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("prism_deco", simple_class_path="prism_deco.integrations.lmms_eval.PrismDeco")
