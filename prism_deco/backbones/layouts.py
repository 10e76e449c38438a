"""Renames a tower's parameters between libraries; timm's names are the common form.

A checkpoint's layout is recognised by its keys. The original DINOv2 release and open_clip's models with a timm
trunk use timm's names, except for those in `_TIMM`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

# Library's name part -> timm's, replaced in this order. Each part stands between dots; `_rename` adds those at both
# ends of a name.
_OPEN_CLIP = {
    ".class_embedding.": ".cls_token.",
    ".positional_embedding.": ".pos_embed.",
    ".conv1.": ".patch_embed.proj.",
    ".ln_pre.": ".norm_pre.",
    ".ln_post.": ".norm.",
    ".transformer.resblocks.": ".blocks.",
    ".ln_1.": ".norm1.",
    ".ln_2.": ".norm2.",
    ".in_proj_weight.": ".qkv.weight.",
    ".in_proj_bias.": ".qkv.bias.",
    ".attn.out_proj.": ".attn.proj.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
_HUGGING_FACE = {  # CLIPVisionModel, SiglipVisionModel
    ".embeddings.class_embedding.": ".cls_token.",
    ".embeddings.position_embedding.weight.": ".pos_embed.",
    ".embeddings.patch_embedding.": ".patch_embed.proj.",
    ".pre_layrnorm.": ".norm_pre.",
    ".post_layernorm.": ".norm.",
    ".encoder.layers.": ".blocks.",
    ".layer_norm1.": ".norm1.",
    ".layer_norm2.": ".norm2.",
    **{f".self_attn.{part}_proj.": f".attn.{part}." for part in "qkv"},
    ".self_attn.out_proj.": ".attn.proj.",
}
_HUGGING_FACE_DINOV2 = {  # Dinov2WithRegistersModel, Dinov2Model; older files say attention.attention.query
    ".embeddings.cls_token.": ".cls_token.",
    ".embeddings.mask_token.": ".mask_token.",
    ".embeddings.register_tokens.": ".reg_token.",
    ".embeddings.position_embeddings.": ".pos_embed.",
    ".embeddings.patch_embeddings.projection.": ".patch_embed.proj.",
    ".layernorm.": ".norm.",
    ".encoder.layer.": ".blocks.",
    **{f".attention.attention.{part}.": f".attn.{part[0]}." for part in ("query", "key", "value")},
    **{f".attention.{part}_proj.": f".attn.{part}." for part in "qkv"},
    ".attention.output.dense.": ".attn.proj.",
    ".attention.o_proj.": ".attn.proj.",
    ".layer_scale1.lambda1.": ".ls1.gamma.",
    ".layer_scale2.lambda1.": ".ls2.gamma.",
}
_TIMM = {".register_tokens.": ".reg_token."}


@dataclass(frozen=True)
class Layout:
    """One library's names: `marker` is a key that only this layout has; `names` maps its name parts to timm's."""

    name: str
    marker: str
    names: Mapping[str, str]


LAYOUTS = (
    Layout("open_clip", "transformer.resblocks.0.ln_1.weight", _OPEN_CLIP),
    Layout("Hugging Face", "encoder.layers.0.layer_norm1.weight", _HUGGING_FACE),
    Layout("Hugging Face DINOv2", "encoder.layer.0.norm1.weight", _HUGGING_FACE_DINOV2),
    Layout("timm", "blocks.0.norm1.weight", _TIMM),
)

# Prefixes of the vision tower in checkpoints of whole models, the longest first.
_PREFIXES = ("visual.trunk.", "visual.", "vision_model.", "dinov2_with_registers.", "dinov2.")
# Other keys of such checkpoints: the text tower, projections, temperatures.
_OTHERS = re.compile(
    r"^(text|text_model|transformer|token_embedding|ln_final|visual\.head|head)\."
    r"|^(text_projection|visual_projection)(\.weight)?$"
    r"|^(positional_embedding|logit_scale|logit_bias|attn_mask|input_resolution|context_length|vocab_size)$"
)
# Keys of the vision tower that come after the last block or are not weights.
_AFTER = re.compile(r"^(norm|fc_norm|head|attn_pool)\.|^proj$|^mask_token$|^embeddings\.position_ids$")


def split_vision(keys: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Finds the vision tower of a checkpoint.

    Returns:
        The tower's keys without their prefix -> the checkpoint's keys; and the keys that belong neither to the tower
        nor to other known parts of such checkpoints.
    """
    # Lightning and DDP add these prefixes.
    bare = {re.sub(r"^(module|model)\.", "", key): key for key in keys}
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in bare)), "")
    vision = {key[len(prefix) :]: source for key, source in bare.items() if key.startswith(prefix)}
    stray = [source for key, source in bare.items() if not key.startswith(prefix) and not _OTHERS.match(key)]
    return vision, stray


def recognise(keys: Iterable[str]) -> Layout | None:
    """The layout of the vision tower's keys; None if it is unknown."""
    keys = set(keys)
    return next((layout for layout in LAYOUTS if layout.marker in keys), None)


def to_timm(state: dict[str, Tensor], layout: Layout, tap: int, depth: int) -> dict[str, Tensor]:
    """Weights under timm's names, without those after block `tap` of `depth` blocks."""
    result = {}
    for key, value in state.items():
        name = _rename(key, layout.names)
        block = re.match(r"^blocks\.(\d+)\.", name)
        is_after = tap < int(block[1]) < depth if block else _AFTER.match(name)
        if not is_after:
            result[name] = value
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
    return _from_timm(state, _OPEN_CLIP)


def to_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names -> those of transformers' CLIPVisionModel and SiglipVisionModel.

    The joint projection float[3D, D] becomes one float[D, D] each for queries, keys and values.
    """
    split = {}
    for key, value in state.items():
        if ".qkv." in key:
            split |= {key.replace("qkv", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            split[key] = value
    return _from_timm(split, _HUGGING_FACE)


def _from_timm(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """timm's names -> a layout's; the class token float[1, 1, D] -> float[D], the position table float[1, N, D] ->
    float[N, D]."""
    own = {timm_part: part for part, timm_part in names.items()}
    shapes = {"cls_token": "1 1 d -> d", "pos_embed": "1 n d -> n d"}
    flat = {key: rearrange(value, shapes[key]) if key in shapes else value for key, value in state.items()}
    return {_rename(key, own): value for key, value in flat.items()}


def _rename(key: str, names: Mapping[str, str]) -> str:
    key = f".{key}."
    for old, new in names.items():
        key = key.replace(old, new)
    return key.strip(".")
