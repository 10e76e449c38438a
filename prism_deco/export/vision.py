"""A tower in the shape of Hugging Face's CLIPVisionModel or SiglipVisionModel."""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from prism_deco.backbones import VisionBackbone
from prism_deco.backbones.tower import Tower
from prism_deco.backbones.trunks import OpenClipTrunk, TimmTrunk, Trunk

_OPEN_CLIP = (
    (r"^class_embedding$", "embeddings.class_embedding"),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^conv1\.", "embeddings.patch_embedding."),
    (r"^ln_pre\.", "pre_layrnorm."),
    (r"^transformer\.resblocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.in_proj_(weight|bias)$", r".self_attn.qkv.\1"),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_TIMM = (
    (r"^pos_embed$", "embeddings.position_embedding.weight"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.(weight|bias)$", r".self_attn.qkv.\1"),
    (r"\.attn\.proj\.", ".self_attn.out_proj."),
)
_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_pytorch_tanh"}


def vision_model(backbone: VisionBackbone) -> PreTrainedModel:
    """The tower's own weights in Hugging Face's class, cut off after the block whose output is used.

    Its `hidden_states[-1]` is what the tower gives, with the class token in front in CLIP.

    Raises:
        ValueError: there is no such class for it; says why.
    """
    if not isinstance(backbone, Tower):
        raise ValueError("it has several vision towers, and that class has one")
    trunk = backbone.trunk
    if isinstance(trunk, OpenClipTrunk):
        block, renames = cast(Any, trunk.blocks[0]), _OPEN_CLIP
        sizes = _sizes(trunk, backbone.image_size, block.attn.num_heads, block.mlp.c_fc, block.mlp.gelu, block.ln_1)
        model = _hollow(CLIPVisionModel, CLIPVisionConfig(**sizes))
    elif isinstance(trunk, TimmTrunk):
        embedding = trunk.vit.patch_embed
        if not isinstance(getattr(embedding, "proj", None), nn.Conv2d):
            raise ValueError(
                f"its tower embeds patches by a {type(embedding).__name__} (a convolutional stem), and transformers' "
                "towers do by one convolution"
            )
        block, renames = cast(Any, trunk.blocks[0]), _TIMM
        sizes = _sizes(trunk, backbone.image_size, block.attn.num_heads, block.mlp.fc1, block.mlp.act, block.norm1)
        model = _hollow(SiglipVisionModel, SiglipVisionConfig(**sizes, vision_use_head=False))
    else:
        raise ValueError(f"transformers has no class for the tower {type(trunk).__name__}")
    state = _split_attention({_rename(k, renames): v for k, v in trunk.vit.state_dict().items()})
    # The norm after the last block takes no part in the features; the class has it all the same.
    unused = next(iter(state.values())).new_zeros(trunk.embed_dim)
    state |= {"post_layernorm.weight": unused + 1, "post_layernorm.bias": unused}
    own = {name: tensor.shape for name, tensor in model.state_dict().items()}
    strange = sorted({_part(n) for n in own.keys() ^ state.keys()} | {n for n in own if _differs(state.get(n), own[n])})
    if strange:
        raise ValueError(
            f"its tower is none of transformers' CLIP or SigLIP towers: they differ in {', '.join(strange[:4])}"
        )
    model.load_state_dict(state, assign=True)
    return model


def _sizes(
    trunk: Trunk, image_size: int, heads: int, hidden: nn.Linear, activation: nn.Module, norm: Any
) -> dict[str, Any]:
    kind = type(activation).__name__
    if kind not in _ACTIVATIONS:
        raise ValueError(f"its tower's activation {kind} has no name in transformers")
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


def _hollow(model_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class(config)


def _rename(key: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _split_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """One projection each for queries, keys and values; position tables float[1, N, D] -> float[N, D]."""
    result = {}
    for key, tensor in state.items():
        if ".qkv." in key:
            result |= {key.replace("qkv", f"{part}_proj"): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            result[key] = tensor.squeeze(0) if key.startswith("embeddings.position_embedding") else tensor
    return result


def _part(name: str) -> str:
    """The name of a weight without the number of its block."""
    return re.sub(r"^encoder\.layers\.\d+\.", "", name)


def _differs(tensor: Tensor | None, shape: torch.Size) -> bool:
    return tensor is not None and tensor.shape != shape
