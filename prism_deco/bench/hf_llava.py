"""transformers' own LLaVA with the weights of a `VLM`, to compare training steps."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from prism_deco.backbones import VisionBackbone
from prism_deco.errors import UsageError
from prism_deco.projectors.linear import Linear
from prism_deco.sequence import Batch
from prism_deco.vlm import VLM


class _VisionTower(nn.Module):
    def __init__(self, backbone: VisionBackbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, pixels: Mapping[str, Tensor], **_: Any) -> BaseModelOutputWithPooling:
        # The single entry is what `vision_feature_layer=0` selects.
        return BaseModelOutputWithPooling(hidden_states=(self.backbone(pixels),))  # type: ignore[arg-type]


def build_peer(vlm: VLM) -> LlavaForConditionalGeneration:
    """transformers' model sharing the backbone, projector and LLM of `vlm`.

    It takes over the LLM's output layer, since transformers' own lacks the bias that Phi-2 needs, and every projector
    other than a `linear` one with two layers.

    Raises:
        UsageError: the recipe changes features, tokens or attention.
    """
    if vlm.feature_mean is not None or vlm.token_scale is not None or vlm.turn_mask != "causal":
        raise UsageError("transformers' LLaVA has none of the recipe's options on features and attention: recipe=prism")
    projector = vlm.projector
    layers = [m for m in projector.modules() if isinstance(m, nn.Linear)] if isinstance(projector, Linear) else []
    language = cast(Any, vlm.lm)
    config = LlavaConfig(
        # A placeholder that never runs; one head divides every width.
        vision_config=CLIPVisionConfig(hidden_size=projector.in_dim, num_hidden_layers=1, num_attention_heads=1),
        text_config=copy.deepcopy(language.config),
        image_token_index=image_token(vlm),
        projector_hidden_act="gelu",
        vision_feature_layer=0,
        vision_feature_select_strategy="full",
    )
    # Takes no memory: every part is replaced below.
    with torch.device("meta"):
        peer = LlavaForConditionalGeneration(config)
    peer.model.vision_tower = _VisionTower(vlm.backbone)
    if len(layers) == 2:
        peer.model.multi_modal_projector.linear_1, peer.model.multi_modal_projector.linear_2 = layers
    else:
        peer.model.multi_modal_projector = projector  # type: ignore[assignment]
    peer.model.language_model = language.base_model
    peer.lm_head = language.get_output_embeddings()
    return peer


def image_token(vlm: VLM) -> int:
    """The id of the image placeholder in the peer's input: the last row of the vocabulary."""
    return cast(nn.Embedding, vlm.lm.get_input_embeddings()).num_embeddings - 1


def peer_loss(peer: LlavaForConditionalGeneration, batch: Batch, num_targets: int) -> Tensor:
    """float[]: the mean loss of a padded batch, called as transformers' Trainer does."""
    output = peer(
        input_ids=batch.input_ids.masked_fill(batch.visual, peer.config.image_token_id),
        pixel_values=batch.pixels,
        attention_mask=batch.attention_mask.long(),
        labels=batch.labels,
        num_items_in_batch=torch.tensor(num_targets, device=batch.labels.device),
        use_cache=False,
    )
    return output.loss
