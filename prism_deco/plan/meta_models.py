"""The parts of a model on the meta device, without weights.

Runs of a grid share them: equal options return the same module, and other functions use the module as a cache key.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from omegaconf import DictConfig, OmegaConf
from timm.layers import weight_init
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from transformers import PreTrainedModel

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.build import compose_projector, group, prompt_options, tune_tower
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.llms.spec import architecture
from prism_deco.llms.tuning import tuning
from prism_deco.projectors import Projector, build_projector


class NeedsData(Exception):
    """A part cannot run on tensors without data, so the run cannot be planned."""


@contextmanager
def without_data(part: str) -> Iterator[None]:
    """Runs a part on tensors without data.

    Raises:
        NeedsData: the part asks for values. Any other error passes through.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, _NO_DATA) and not _SPEAKS_OF_IT.search(str(error)):
            raise
        reason = str(error).strip().splitlines()[0]
        raise NeedsData(f"the {part} cannot be run without data ({type(error).__name__}: {reason})") from error


_NO_DATA = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)
_SPEAKS_OF_IT = re.compile(r"\bmeta\b|_meta\b|FakeTensor|tensor subclasses")
"""torch also reports missing data in errors of general classes: their messages match this."""


def backbone_of(config: DictConfig) -> VisionBackbone:
    """The configured backbone on the meta device with its trained parameters marked. Shared: do not change it."""
    # The recipe's keys that change the tower. Without them, runs of different recipes share a frozen tower.
    keys = ("tower", "tower_layers", "lora_r", "lora_alpha", "lora_dropout")
    recipe = {key: config.recipe[key] for key in keys} if config.recipe.tower != "frozen" else None
    return _backbone(json.dumps({"backbone": group(config, "backbone"), "recipe": recipe}))


def short_backbone(backbone: VisionBackbone) -> tuple[VisionBackbone, list[tuple[nn.Module, int]]]:
    """A copy with one block for each run of equal blocks, and these blocks, each with the length of its run."""
    left_out: dict[int, Any] = {}
    counts: list[int] = []
    before = None
    for block in backbone.blocks:
        # Blocks with parameters of the same shapes count as equal.
        shapes = [parameter.shape for parameter in block.parameters()]
        if shapes == before:
            left_out[id(block)] = _PassThrough()
            counts[-1] += 1
        else:
            counts.append(1)
        before = shapes
    short = copy.deepcopy(backbone, left_out)  # deepcopy takes an object in its memo for already copied
    blocks = [block for block in short.blocks if not isinstance(block, _PassThrough)]
    return short, list(zip(blocks, counts, strict=True))


class _PassThrough(nn.Module):
    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden


def llm_key(config: DictConfig) -> str:
    """A key for the LLM and the way it is trained."""
    recipe = config.recipe
    adapters = {"r": recipe.lora_r, "alpha": recipe.lora_alpha, "dropout": recipe.lora_dropout}
    return json.dumps(
        {"llm": group(config, "llm"), "prompt": prompt_options(config), "lm": recipe.lm, "adapters": adapters}
    )


def llm_of(config: DictConfig) -> LanguageModel:
    """The configured LLM on the meta device with its trained parameters marked. Shared: do not change it."""
    return _llm(llm_key(config))


def build_shallow(key: str, depth: int) -> PreTrainedModel:
    """A new LLM of that `llm_key` with `depth` decoder layers."""
    content = json.loads(key)
    # The architecture's own name for the number of layers.
    name = architecture(_llm(key).spec).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    settings = content["llm"]["architecture"]
    for option, value in settings.items():
        if "layer" in option and isinstance(value, list) and len(value) == settings.get(name):  # such as `layer_types`
            settings[option] = value[:depth]
    settings[name] = depth
    return _build_llm(content).model


def projector_of(config: DictConfig) -> Projector:
    """The configured projector on the meta device. Shared: do not change it."""

    def build(name: str, **options: Any) -> Projector:
        # JSON, since a cache needs arguments that can be hashed.
        return _projector(json.dumps({"name": name} | options))

    return compose_projector(config, backbone_of(config), llm_of(config), bare=True, build=build)


def count(*modules: nn.Module, trained: bool = False) -> int:
    """Number of parameters, or of the trained ones only; shared parameters count once."""
    unique = {p for module in modules for p in module.parameters()}
    return sum(p.numel() for p in unique if p.requires_grad or not trained)


@lru_cache(maxsize=16)
def _backbone(options: str) -> VisionBackbone:
    # Skips timm's random initialisation, which is slow and has no effect on the meta device.
    with mock.patch.object(weight_init, "_trunc_normal_", lambda *_: None, create=True):
        content = json.loads(options)
        backbone = build_backbone(content["backbone"], pretrained=False, device="meta")
        if content["recipe"]:
            tune_tower(backbone, OmegaConf.create(content["recipe"]))
        return backbone


@lru_cache(maxsize=64)
def _projector(options: str) -> Projector:
    with torch.device("meta"):
        return build_projector(**json.loads(options))


@lru_cache(maxsize=16)
def _llm(key: str) -> LanguageModel:
    return _build_llm(json.loads(key))


def _build_llm(content: dict[str, Any]) -> LanguageModel:
    llm = build_llm(content["llm"], device="meta", **content["prompt"])
    tuning(content["lm"]).apply(llm.model, **content["adapters"])
    return llm
