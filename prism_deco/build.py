"""Builds the model and its parts from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.config.registry import import_plugins
from prism_deco.data.encoder import Encoder
from prism_deco.errors import UsageError
from prism_deco.llms import LanguageModel, build_llm
from prism_deco.llms.lora import add_lora
from prism_deco.llms.tuning import tuning
from prism_deco.projectors import Projector, build_projector
from prism_deco.vlm import VLM


def group(config: DictConfig, name: str) -> dict[str, Any]:
    """One group of the configuration as a plain dict, interpolations resolved."""
    content = OmegaConf.to_container(config[name], resolve=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def prompt_options(config: DictConfig) -> dict[str, Any]:
    """The recipe's keys about tokens and prompts, as options of `build_llm`."""
    recipe = config.recipe
    options = {key: recipe[key] for key in ("image_slot", "prompt", "added_tokens")}
    # Without a value, the LLM's own YAML decides.
    return options if recipe.tokenize is None else options | {"tokenize": recipe.tokenize}


def record_options(config: DictConfig) -> dict[str, Any]:
    """The keys that select records, as options of `data.records.open_parts`."""
    names = ("val_fraction", "limit", "on_bad_record")
    return {name: config.data[name] for name in names} | {"odd_records": config.recipe.odd_records}


def build_encoder(config: DictConfig, llm: LanguageModel, tokens_per_image: int) -> Encoder:
    """The encoder of records, with the configured length limits."""
    return Encoder(
        llm,
        max_text_tokens=config.recipe.max_text_tokens,
        max_positions=max_positions(config, llm),
        tokens_per_image=tokens_per_image,
        shorten=config.recipe.long_questions == "shorten",
    )


def max_positions(config: DictConfig, llm: LanguageModel) -> int:
    """Longest sequence, visual tokens included: the LLM's limit, or the recipe's if that is lower."""
    return min(llm.max_positions, config.recipe.max_positions or llm.max_positions)


def build_model(
    config: DictConfig, *, device: str | torch.device = "cpu", defer_llm: bool = False
) -> tuple[VLM, LanguageModel]:
    """Builds the configured backbone, projector and LLM. Random weights come from torch's global generator.

    Args:
        device: the model's device; "meta" builds the architecture without reading weights.
        defer_llm: leave the LLM on the meta device, for a caller that loads its weights itself.

    Raises:
        UsageError: the parts do not fit together (grid, tokens, positions), or the recipe has several stages.
    """
    import_plugins(config.plugins)
    recipe = config.recipe
    if recipe.stages:
        raise UsageError(
            f"recipe={recipe.name} is made of stages, each a run of its own: name one of them "
            f"({'; '.join(f'{name}: {stage[0]}' for name, stage in recipe.stages.items())})."
        )
    if config.trainer.feature_cache and recipe.tower != "frozen":
        raise UsageError(
            f"trainer.feature_cache=true stores what a frozen tower computes, and recipe.tower={recipe.tower} changes "
            "the tower at every step: leave one of them out."
        )
    if recipe.turn_mask == "block" and recipe.image_slot == "in_place":
        raise UsageError(
            "recipe.turn_mask=block needs recipe.image_slot=after_bos: in place, the image belongs to the round that "
            "shows it, and later rounds would not see it."
        )
    device = torch.device(device)
    bare = device.type == "meta"
    backbone = build_backbone(group(config, "backbone"), pretrained=not bare, device=device)
    if recipe.tower != "frozen":
        tune_tower(backbone, recipe)
    way = tuning(recipe.lm)
    if way.quantize and config.trainer.strategy == "fsdp":
        raise UsageError(
            f"recipe.lm={recipe.lm} cannot be sharded: choose trainer=gpu or trainer=ddp, or recipe.lm=lora."
        )
    place = "meta" if defer_llm else device
    llm = build_llm(group(config, "llm"), quantize=way.quantize, device=place, **prompt_options(config))
    own_seed = recipe.projector_seed == "tower_width" and not bare
    # Forking leaves the run's generator as it was. devices=[]: only the CPU's generator is seeded here.
    with device, torch.random.fork_rng(devices=[], enabled=own_seed):
        if own_seed:
            torch.default_generator.manual_seed(backbone.embed_dim)
        projector = compose_projector(config, backbone, llm, bare=bare)
    source = llm.spec.weights or llm.spec.hub
    way.apply(llm.model, r=recipe.lora_r, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout, source=source)
    vlm = VLM(
        backbone,
        projector,
        llm.model,
        standardise_features=recipe.standardise_features,
        token_scale=recipe.token_scale,
        turn_mask=recipe.turn_mask,
        blind=recipe.blind,
        max_logits=recipe.max_logits,
    )
    return vlm if defer_llm else vlm.to(device), llm


def tune_tower(backbone: VisionBackbone, recipe: DictConfig) -> None:
    """Unfreezes the last blocks of a frozen backbone, or adds LoRA adapters to them, as `recipe.tower` says.

    Only linear layers that the forward pass calls get adapters. torch's attention (in CLIP) and timm's Eva read the
    weights of some layers without calling them: an adapter there would have neither effect nor gradient.

    Raises:
        UsageError: a tower has fewer blocks than `recipe.tower_layers`, or peft is not installed.
    """
    way, tail = tuning(recipe.tower), backbone.tail(recipe.tower_layers)
    if way.adapters:
        linear = {layer for part in tail for layer in part.modules() if isinstance(layer, nn.Linear)}
        called: set[nn.Module] = set()
        hooks = [layer.register_forward_hook(lambda layer, *_: called.add(layer)) for layer in linear]
        with torch.no_grad():
            backbone(backbone.blank(next(backbone.parameters()).device))
        for hook in hooks:
            hook.remove()
        names = [name for name, module in backbone.named_modules() if module in called]
        add_lora(backbone, r=recipe.lora_r, alpha=recipe.lora_alpha, dropout=recipe.lora_dropout, layers=names)
    else:
        for part in tail:
            part.requires_grad_(True)
    for module in backbone.modules():
        if isinstance(module, VisionBackbone):  # the members of an ensemble, too
            module.trained = True


def compose_projector(
    config: DictConfig,
    backbone: VisionBackbone,
    llm: LanguageModel,
    *,
    bare: bool,
    build: Callable[..., Projector] = build_projector,
) -> Projector:
    """The configured projector between these two, on torch's default device.

    Args:
        bare: do not load the weights that the configuration may name.
        build: replaces `build_projector`.

    Raises:
        UsageError: it does not fit the grid, or its visual tokens fill the LLM's positions.
    """
    options = group(config, "projector")
    if bare and "weights" in options:
        options["weights"] = None
    projector = build(
        options.pop("name"), in_dim=backbone.embed_dim, out_dim=llm.embed_dim, in_grid=backbone.grid, **options
    )
    room = max_positions(config, llm)
    if projector.num_tokens >= room:
        raise UsageError(
            f"{projector.num_tokens} visual tokens leave no room for text in the {room} positions of "
            f"{config.llm.name}: choose fewer (projector.num_tokens=...) or another LLM."
        )
    return projector
