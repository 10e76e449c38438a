"""Tiny vision transformers for the miniature study, registered with timm and (in CLIP models) with open_clip.

They are timm's VisionTransformer with timm's convolutional stem: plain patches would have to learn the locality of
pixels first, and training takes a few minutes only.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import open_clip
from timm.layers.hybrid_embed import HybridEmbed
from timm.layers.norm import LayerNorm2d
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn

open_clip.add_model_config(Path(__file__).parents[1] / "assets" / "open_clip")

_WIDTH = 96
_CONFIG = {"input_size": (3, 64, 64), "num_classes": 0, "first_conv": "patch_embed.backbone.0.conv"}

# timm reads the default configurations of an architecture from its module, under this name.
default_cfgs = generate_default_cfgs({"vit_tiny_stem_patch8_64": _CONFIG, "vit_tiny_stem_patch8_reg4_64": _CONFIG})


def _build(variant: str, pretrained: bool, **options: Any) -> VisionTransformer:
    # Even kernels with stride 2 floor the size, as the patches of a plain ViT do, and centre every feature on its
    # patch. Layer norm has no running statistics and thus no buffers.
    stem = ConvStem(
        depth=4,
        channels=(_WIDTH // 4, _WIDTH // 2, _WIDTH, _WIDTH),
        kernel_size=(4, 4, 4, 3),
        stride=(2, 2, 2, 1),
        padding=1,
        norm_layer=LayerNorm2d,
        act_layer=nn.GELU,
    )
    shape: dict[str, Any] = {"img_size": 64, "embed_dim": _WIDTH, "depth": 4, "num_heads": 3}
    return build_model_with_cfg(
        VisionTransformer,
        variant,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        # The stem's features are the tokens: it halves the side three times and ends at the model's width.
        embed_layer=partial(HybridEmbed, backbone=stem, proj=False),
        patch_size=1,
        **(shape | options),
    )


@register_model
def vit_tiny_stem_patch8_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Stands in for CLIP's and SigLIP's tower: no prefix tokens, attention pooling."""
    return _build("vit_tiny_stem_patch8_64", pretrained, **({"class_token": False, "global_pool": "map"} | options))


@register_model
def vit_tiny_stem_patch8_reg4_64(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Stands in for DINOv2: class token, 4 registers without positions, LayerScale."""
    layout = {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.1}
    return _build("vit_tiny_stem_patch8_reg4_64", pretrained, **(layout | options))
