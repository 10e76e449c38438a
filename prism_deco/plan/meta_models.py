"""The parts of a cell as bare architectures; cells of a grid share towers and LLMs, so each is built once."""

from __future__ import annotations

import copy
import json
from functools import lru_cache
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn
from transformers import PreTrainedModel

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.build import group, max_positions, prompt_options
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.llms.spec import architecture
from prism_deco.llms.tuning import tuning
from prism_deco.projectors import Projector, build_projector


def backbone_key(config: DictConfig) -> str:
    """Tells backbones apart."""
    return json.dumps(group(config, "backbone"))


def backbone_of(config: DictConfig) -> VisionBackbone:
    """The configured tower on the meta device; shared, so not to be changed."""
    return _backbone(backbone_key(config))


def fresh_backbone(key: str) -> VisionBackbone:
    """The backbone of that `backbone_key`, the caller's own."""
    return copy.deepcopy(_backbone(key))


def llm_key(config: DictConfig) -> str:
    """Tells LLMs and how they are trained apart."""
    recipe = config.recipe
    adapters = {"r": recipe.lora_r, "alpha": recipe.lora_alpha, "dropout": recipe.lora_dropout}
    return json.dumps(
        {"llm": group(config, "llm"), "prompt": prompt_options(config), "lm": recipe.lm, "adapters": adapters}
    )


def llm_of(config: DictConfig) -> LanguageModel:
    """The configured LLM on the meta device, what is trained of it marked as such; shared, so not to be changed."""
    return _llm(llm_key(config))


def build_shallow(key: str, depth: int) -> PreTrainedModel:
    """The LLM of that `llm_key` with `depth` decoder layers, the caller's own."""
    content = json.loads(key)
    name = architecture(_llm(key).spec).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    content["llm"]["architecture"] |= {name: depth}
    return _build_llm(content).model


def projector_key(config: DictConfig) -> str:
    """Tells projectors and what they stand between apart."""
    backbone, llm = backbone_of(config), llm_of(config)
    sizes = {"in_dim": backbone.embed_dim, "out_dim": llm.embed_dim, "in_grid": backbone.grid}
    bare = {key: None if key == "weights" else value for key, value in group(config, "projector").items()}
    return json.dumps(bare | sizes)


def projector_of(config: DictConfig) -> Projector:
    """The configured projector on the meta device; shared, so not to be changed.

    Raises:
        UsageError: it does not fit the grid, or its tokens do not fit the LLM's positions.
    """
    projector, room = _projector(projector_key(config)), max_positions(config, llm_of(config))
    if projector.num_tokens >= room:
        raise UsageError(
            f"{projector.num_tokens} visual tokens leave no room for text in the {room} positions of "
            f"{config.llm.name}: choose fewer (projector.num_tokens=...) or another LLM."
        )
    return projector


def build_projector_of(key: str) -> Projector:
    """The projector of that `projector_key`, the caller's own."""
    with torch.device("meta"):
        return build_projector(**json.loads(key))


def count(*modules: nn.Module, trained: bool | None = None) -> int:
    """Parameters of modules, shared ones once; only the trained (True) or the frozen (False) ones."""
    unique = {id(p): p for module in modules for p in module.parameters()}.values()
    return sum(p.numel() for p in unique if trained is None or p.requires_grad == trained)


@lru_cache(maxsize=16)
def _backbone(content: str) -> VisionBackbone:
    return build_backbone(json.loads(content), pretrained=False, device="meta")


@lru_cache(maxsize=64)
def _projector(key: str) -> Projector:
    return build_projector_of(key)


@lru_cache(maxsize=16)
def _llm(key: str) -> LanguageModel:
    return _build_llm(json.loads(key))


def _build_llm(content: dict[str, Any]) -> LanguageModel:
    way = tuning(content["lm"])
    llm = build_llm(content["llm"], device="meta", **content["prompt"])
    way.apply(llm.model, **content["adapters"])
    return llm
