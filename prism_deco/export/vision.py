"""Converts a tower to one of transformers' classes: CLIP's, SigLIP's or InternVL's."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from prism_deco.backbones import VisionBackbone
from prism_deco.backbones.layouts import recognise, to_hugging_face, to_timm
from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import OpenClipTrunk, TimmTrunk, Trunk
from prism_deco.errors import UsageError

# Names of CLIPVisionModel -> those of InternVLVisionModel.
_INTERNVL = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding.weight": "embeddings.position_embeddings",
    "embeddings.patch_embedding.": "embeddings.patch_embeddings.projection.",
    "encoder.layers.": "encoder.layer.",
    ".self_attn.out_proj.": ".attention.projection_layer.",
    ".self_attn.": ".attention.",
    ".layer_norm1.": ".layernorm_before.",
    ".layer_norm2.": ".layernorm_after.",
    ".ls1.gamma": ".lambda_1",
    ".ls2.gamma": ".lambda_2",
}
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def vision_model(backbone: VisionBackbone) -> PreTrainedModel:
    """The tower's weights in transformers' class, up to the block whose output is used.

    Its `hidden_states[-1]` is the tower's output, in CLIP and InternVL with the class token before it. InternVL's class
    fits plain ViTs with a class token, with or without LayerScale: InternViT, DINOv2 without registers.

    Raises:
        UsageError: no class fits the tower.
    """
    if not isinstance(backbone, Tower):
        raise UsageError("it has several vision towers, and that class has one")
    trunk = backbone.trunk
    if len(trunk.taps) > 1:
        raise UsageError("its features come from several layers of the tower (backbone.extra_layers)")
    if isinstance(trunk, OpenClipTrunk):
        block = cast(Any, trunk.blocks[0])
        sizes = _sizes(trunk, backbone.image_size, block.attn.num_heads, block.mlp.c_fc, block.mlp.gelu, block.ln_1)
        model_class, config = CLIPVisionModel, CLIPVisionConfig(**sizes)
    elif isinstance(trunk, TimmTrunk) and isinstance(trunk.vit, VisionTransformer):
        embedding = trunk.vit.patch_embed
        if not isinstance(getattr(embedding, "proj", None), nn.Conv2d):
            raise UsageError(
                f"its tower embeds patches by a {type(embedding).__name__} (a convolutional stem), those of "
                "transformers by a single convolution"
            )
        block = cast(Any, trunk.blocks[0])
        if not hasattr(block.mlp, "fc1"):
            raise UsageError(f"its tower's MLP is a {type(block.mlp).__name__}, those of CLIP and SigLIP have no gate")
        sizes = _sizes(trunk, backbone.image_size, block.attn.num_heads, block.mlp.fc1, block.mlp.act, block.norm1)
        if trunk.vit.has_class_token:
            biased = block.attn.qkv.bias is not None
            model_class, config = InternVLVisionModel, InternVLVisionConfig(**sizes, attention_bias=biased)
        else:
            model_class, config = SiglipVisionModel, SiglipVisionConfig(**sizes, vision_use_head=False)
    else:
        raise UsageError(
            f"its tower is a {type(trunk.vit).__name__}, and those classes have a tower of CLIP, SigLIP or InternVL"
        )
    with torch.device("meta"):
        model = model_class(config)  # type: ignore[arg-type]
    state = trunk.vit.state_dict()
    depth = len(trunk.blocks)
    layout = recognise(state)
    assert layout is not None
    state = to_hugging_face(to_timm(state, layout, tap=depth - 1, depth=depth))
    if model_class is InternVLVisionModel:
        state = _to_internvl(state, depth)
    else:
        # The class requires a norm after the last block, which does not affect the features.
        unused = next(iter(state.values())).new_zeros(trunk.embed_dim)
        state |= {"post_layernorm.weight": unused + 1, "post_layernorm.bias": unused}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        difference = " ".join(str(error).split())[:200]
        raise UsageError(f"its tower does not fit transformers' {model_class.__name__} ({difference}…)") from error
    return model


def _to_internvl(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """CLIPVisionModel's names -> InternVLVisionModel's, which has LayerScale (ones, where the tower has none)."""
    renamed = {}
    for name, tensor in state.items():
        # In the order of the table: `self_attn.out_proj` before the rest of `self_attn`.
        for old, new in _INTERNVL.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    ones = torch.ones_like(renamed["encoder.layer.0.layernorm_before.weight"])
    scales = {f"encoder.layer.{k}.lambda_{part}": ones.clone() for k in range(depth) for part in (1, 2)}
    for name in ("embeddings.cls_token", "embeddings.position_embeddings"):
        # CLIP has float[D] and float[N + 1, D], InternVL float[1, 1, D] and float[1, N + 1, D].
        renamed[name] = renamed[name].reshape(1, -1, len(ones))
    # The tower's own scales take the place of ones.
    return scales | renamed


def _sizes(
    trunk: Trunk, image_size: int, heads: int, hidden: nn.Linear, activation: nn.Module, norm: Any
) -> dict[str, Any]:
    kind = type(activation).__name__
    if kind not in _ACTIVATIONS:
        raise UsageError(f"transformers has no name for its tower's activation {kind}")
    return {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": hidden.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": trunk.patch_size,
        "hidden_act": _ACTIVATIONS[kind],
        "layer_norm_eps": norm.eps,
    }
