"""Parameter names of the same tower in different libraries, brought to timm's names.

A checkpoint's layout is recognised from its keys. The original DINOv2 release and open_clip's models
with a timm trunk use timm's names but for the few that `_TIMM` changes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

Renames = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Layout:
    """One library's names: `marker` is a key that only this layout has, `renames` are applied in order."""

    name: str
    marker: str
    renames: Renames


_OPEN_CLIP = (
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^conv1\.", "patch_embed.proj."),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^proj$", "head.weight"),
    (r"^transformer\.resblocks\.(\d+)\.", r"blocks.\1."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"\.in_proj_(weight|bias)$", r".qkv.\1"),
    (r"\.attn\.out_proj\.", ".attn.proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)
_HUGGING_FACE = (  # CLIPVisionModel, SiglipVisionModel
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
)
_HUGGING_FACE_DINOV2 = (  # Dinov2WithRegistersModel, Dinov2Model; older files say attention.attention.query
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.mask_token$", "mask_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"\.attention\.attention\.([qkv])[a-z]+\.", r".attn.\1."),
    (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)
_TIMM = ((r"^register_tokens$", "reg_token"),)

LAYOUTS = (
    Layout("open_clip", "transformer.resblocks.0.ln_1.weight", _OPEN_CLIP),
    Layout("Hugging Face", "encoder.layers.0.layer_norm1.weight", _HUGGING_FACE),
    Layout("Hugging Face DINOv2", "encoder.layer.0.norm1.weight", _HUGGING_FACE_DINOV2),
    Layout("timm", "blocks.0.norm1.weight", _TIMM),
)

# How whole models name their vision tower, the longest first.
_PREFIXES = ("visual.trunk.", "visual.", "vision_model.", "dinov2_with_registers.", "dinov2.")
# What stands beside the vision tower in such files: the text tower, projections, temperatures.
_OTHERS = re.compile(
    r"^(text|text_model|transformer|token_embedding|ln_final|visual\.head|head)\."
    r"|^(text_projection|visual_projection)(\.weight)?$"
    r"|^(positional_embedding|logit_scale|logit_bias|attn_mask|input_resolution|context_length|vocab_size)$"
)
# Parts of the vision tower that come after the tap, or are no weights.
_AFTER = re.compile(r"^(norm|fc_norm|head|attn_pool)\.|^mask_token$|^embeddings\.position_ids$")


def split_vision(keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Finds the vision tower of a checkpoint.

    Returns:
        The tower's keys without their prefix -> the checkpoint's keys; and keys that belong neither to
        it nor to the parts known to stand beside it.
    """
    # Lightning's and DDP's wrappers.
    bare = {re.sub(r"^(module|model)\.", "", key): key for key in keys}
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in bare)), "")
    vision = {key[len(prefix) :]: source for key, source in bare.items() if key.startswith(prefix)}
    stray = [source for key, source in bare.items() if not key.startswith(prefix) and not _OTHERS.match(key)]
    return vision, stray


def recognise(keys: Iterable[str]) -> Layout | None:
    """The layout of the vision tower's keys; None where none of them is known."""
    keys = set(keys)
    return next((layout for layout in LAYOUTS if layout.marker in keys), None)


def to_timm(state: dict[str, Tensor], layout: Layout, tap: int, depth: int) -> dict[str, Tensor]:
    """Weights under timm's names, without what comes after block `tap` of `depth` blocks."""
    renamed = {_rename(key, layout.renames): value for key, value in state.items()}
    result = {key: value for key, value in renamed.items() if not _is_after(key, tap, depth)}
    for name in [key for key in result if re.search(r"\.attn\.q\.(weight|bias)$", key)]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in result for part in parts):
            result[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([result.pop(part) for part in parts])
    if "cls_token" in result:
        result["cls_token"] = result["cls_token"].reshape(1, 1, -1)
    if "pos_embed" in result and result["pos_embed"].ndim == 2:
        result["pos_embed"] = rearrange(result["pos_embed"], "n d -> 1 n d")
    return result


def to_open_clip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of open_clip's VisionTransformer."""
    renames = (
        (r"^norm_pre\.", "ln_pre."),
        (r"^patch_embed\.proj\.", "conv1."),
        (r"^blocks\.", "transformer.resblocks."),
        (r"\.norm([12])\.", r".ln_\1."),
        (r"\.qkv\.(weight|bias)$", r".in_proj_\1"),
        (r"\.attn\.proj\.", ".attn.out_proj."),
        (r"\.mlp\.fc1\.", ".mlp.c_fc."),
        (r"\.mlp\.fc2\.", ".mlp.c_proj."),
        (r"^cls_token$", "class_embedding"),
        (r"^pos_embed$", "positional_embedding"),
    )
    result = {_rename(key, renames): value for key, value in state.items()}
    if "class_embedding" in result:
        result["class_embedding"] = rearrange(result["class_embedding"], "1 1 d -> d")
    if "positional_embedding" in result:
        result["positional_embedding"] = rearrange(result["positional_embedding"], "1 n d -> n d")
    return result


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of transformers' CLIPVisionModel and SiglipVisionModel.

    The joint projection float[3D, D] becomes one float[D, D] each for queries, keys and values; the class token
    float[1, 1, D] -> float[D], the position table float[1, N, D] -> float[N, D].
    """
    renames = (
        (r"^cls_token$", "embeddings.class_embedding"),
        (r"^pos_embed$", "embeddings.position_embedding.weight"),
        (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
        (r"^norm_pre\.", "pre_layrnorm."),
        (r"^blocks\.", "encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."),
        (r"\.attn\.proj\.", ".self_attn.out_proj."),
    )
    result = {}
    for key, value in state.items():
        key = _rename(key, renames)
        if ".qkv." in key:
            result |= {key.replace("qkv", f"{part}_proj"): t for part, t in zip("qkv", value.chunk(3), strict=True)}
        elif key == "embeddings.class_embedding":
            result[key] = rearrange(value, "1 1 d -> d")
        elif key == "embeddings.position_embedding.weight":
            result[key] = rearrange(value, "1 n d -> n d")
        else:
            result[key] = value
    return result


def _rename(key: str, renames: Renames) -> str:
    for pattern, replacement in renames:
        key = re.sub(pattern, replacement, key)
    return key


def _is_after(key: str, tap: int, depth: int) -> bool:
    block = re.match(r"^blocks\.(\d+)\.", key)
    return tap < int(block[1]) < depth if block else bool(_AFTER.match(key))
