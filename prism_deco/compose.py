"""From the configuration to the model."""

from __future__ import annotations

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from prism_deco.backbones import build_backbone
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.projectors import build_projector
from prism_deco.registry import import_plugins
from prism_deco.vlm import VLM


def group(config: DictConfig, name: str) -> dict[str, Any]:
    """One group of the configuration as a plain dict, interpolations resolved."""
    content = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def build_model(config: DictConfig, *, device: str | torch.device | None = None) -> tuple[VLM, LanguageModel]:
    """Composes backbone, projector and LLM as configured; random parts follow torch's global seed.

    Args:
        device: where the model lives; on "meta" it is the bare architecture, and no weights are read.

    Raises:
        ValueError: the parts do not fit together (grid, tokens, positions).
    """
    import_plugins(config.plugins)
    recipe = config.recipe
    if recipe.turn_mask == "block" and recipe.image_slot == "in_place":
        raise ValueError(
            "recipe.turn_mask=block needs recipe.image_slot=after_bos: in place, the image belongs to the round that "
            "shows it, and later rounds would not see it."
        )
    device = torch.device(device or "cpu")
    bare = device.type == "meta"
    backbone = build_backbone(group(config, "backbone"), pretrained=not bare, device=device)
    llm = build_llm(group(config, "llm"), image_slot=recipe.image_slot, device=device)
    options = group(config, "projector")
    if bare and "weights" in options:
        options["weights"] = None
    with device:
        projector = build_projector(
            options.pop("name"), in_dim=backbone.embed_dim, out_dim=llm.embed_dim, in_grid=backbone.grid, **options
        )
    if projector.num_tokens >= llm.max_positions:
        raise ValueError(
            f"{projector.num_tokens} visual tokens leave no room for text in the {llm.max_positions} positions of "
            f"{config.llm.name}: choose fewer (projector.num_tokens=...) or another LLM."
        )
    vlm = VLM(
        backbone,
        projector,
        llm.model,
        standardise_features=recipe.standardise_features,
        token_scale=recipe.token_scale,
        turn_mask=recipe.turn_mask,
        blind=recipe.blind,
    )
    return vlm.to(device), llm
