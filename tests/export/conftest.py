"""Tiny models of architectures that transformers also has, with random weights."""

import json

import open_clip
import pytest
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from prism_deco.build import build_model
from prism_deco.config import load_config
from prism_deco.vlm import VLM

LLM = ["llm.pretrained=false", "run_id=test"]
SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 32, 3, 2
NO_HEAD = {"input_size": (3, SIZE, SIZE), "num_classes": 0}
default_cfgs = generate_default_cfgs({"export_vit": NO_HEAD, "export_vit_cls": NO_HEAD, "export_vit_plain": NO_HEAD})


@register_model
def export_vit(pretrained: bool = False, **options) -> VisionTransformer:
    shape = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    layout = {"class_token": False, "global_pool": "map"}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(
        VisionTransformer, "export_vit", False, feature_cfg=features, **(shape | layout | options)
    )


@register_model
def export_vit_cls(pretrained: bool = False, **options) -> VisionTransformer:
    """Like InternViT and DINOv2 without registers: a class token, LayerScale, no norm before the blocks."""
    return export_vit(**{"class_token": True, "global_pool": "token", "init_values": 0.5} | options)


@register_model
def export_vit_plain(pretrained: bool = False, **options) -> VisionTransformer:
    """Like the original ViT: a class token and no LayerScale."""
    return export_vit(**{"class_token": True, "global_pool": "token"} | options)


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> dict[str, str]:
    """The YAML files of CLIP-, SigLIP-, InternViT- and ViT-like backbones with random weights, by name."""
    folder = tmp_path_factory.mktemp("towers")
    vision = {"image_size": SIZE, "layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    timm = {"image_size": SIZE, "timm_model_name": "export_vit", "timm_pool": "map", "timm_proj": "none"}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    paths = {}
    for family, quick, tower in (("clip", True, vision), ("siglip", False, timm)):
        name = f"export-{family}"
        content = {"embed_dim": 16, "quick_gelu": quick, "vision_cfg": tower, "text_cfg": text}
        (folder / f"{name}.json").write_text(json.dumps(content))
        yaml = folder / f"tiny_{family}.yaml"
        yaml.write_text(f"family: {family}\nmodel: {name}\npretrained: false\n")
        paths[family] = str(yaml)
    open_clip.add_model_config(folder)
    for name, model in (("vit", "export_vit_cls"), ("plain", "export_vit_plain")):
        yaml = folder / f"tiny_{name}.yaml"
        yaml.write_text(f"family: timm\nmodel: {model}\npretrained: false\n")
        paths[name] = str(yaml)
    return paths


@pytest.fixture
def random_model(towers):
    """(tower, overrides) -> (configuration, VLM, LanguageModel) with random weights everywhere."""

    def build(tower: str, *overrides: str):
        choice = towers.get(tower, tower)
        plain = ["projector=linear", "recipe.turn_mask=causal", "recipe.standardise_features=false"]
        config = load_config([f"backbone={choice}", *plain, "recipe.token_scale=null", *LLM, *overrides])
        torch.manual_seed(1)
        vlm, llm = build_model(config)
        return config, randomised(vlm), llm

    return build


def randomised(vlm: VLM) -> VLM:
    """Randomises biases, norms and statistics, whose constant initial values would hide mistakes."""
    with torch.no_grad():
        for name, tensor in vlm.state_dict().items():
            if name.endswith("_std") or "norm" in name or "ln_" in name:
                tensor.add_(torch.rand_like(tensor) * 0.5)
            elif tensor.ndim < 2 and not name.endswith("lm_head.bias"):
                tensor.copy_(torch.randn_like(tensor) * 0.1)
    return vlm.eval()
