"""The continuation through the towers, against the full matrices with attention written out."""

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import Block
from torch.nn import functional as F

from prism_deco.explain.gae import relevance
from prism_deco.sequence import build_batch

PROMPT, ANSWER = "What color is it?", "red"


def written_out(kept):
    """softmax(qk)v in place of the fused kernel, keeping the probabilities as nodes of the graph."""

    def attention(query, key, value, *_, **__):
        kept.append((query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1))
        return kept[-1] @ value

    return attention


@pytest.mark.parametrize("name", ["mini_siglip", "mini_clip", "mini_dinov2", "mini_dinov2_siglip"])
def test_through_the_towers_is_the_product_with_their_full_matrices(small, picture, monkeypatch, name):
    vlm, llm = small(projector="avgpool", backbone=name)
    for block in vlm.backbone.blocks:
        weight = block.attn.qkv.weight if isinstance(block, Block) else block.attn.in_proj_weight
        assert isinstance(block, Block | ResidualAttentionBlock)
        weight.data.mul_(3)
        if hasattr(block.ls1, "gamma"):
            block.ls1.gamma.data.fill_(1)  # an untrained layer scale all but switches attention off
    plain = relevance(vlm, llm, picture, PROMPT, ANSWER)
    deep = relevance(vlm, llm, picture, PROMPT, ANSWER, through_backbone=True)
    torch.testing.assert_close(deep.text_to_query, plain.text_to_query)

    inside = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", written_out(inside))
    pixels = {tower: x[None].double().requires_grad_() for tower, x in vlm.backbone.transform(picture).items()}
    features = (vlm.backbone(pixels) - vlm.feature_mean) / vlm.feature_std
    monkeypatch.undo()
    encoded = llm.encode([{"role": "user", "content": PROMPT}, {"role": "assistant", "content": ANSWER}], num_images=1)
    batch = build_batch([encoded], 16)
    hidden = vlm.hidden_states(batch, vlm.project(features))
    positions = [p for p, label in enumerate(batch.labels[0].tolist()) if label != -100][: len(plain.tokens)]
    assert len(inside) == len(vlm.backbone.blocks)
    for t, p in enumerate(positions):
        target = vlm.logits(hidden)[0, p - 1, batch.labels[0, p]]
        gradients = torch.autograd.grad(target, inside, retain_graph=True)
        maps, per_tower = [], len(inside) // len(vlm.backbone.towers)
        for first in range(0, len(inside), per_tower):
            tower = torch.eye(inside[first].shape[-1], dtype=torch.float64)
            for a, g in list(zip(inside, gradients, strict=True))[first : first + per_tower]:
                tower = tower + torch.relu(a * g)[0].mean(dim=0).detach() @ tower
            maps.append(plain.text_to_patch[t] @ tower[-64:, -64:])
        # What the towers add is small in untrained ones: it is compared by itself.
        added, expected = (result - plain.text_to_patch[t] for result in (deep.text_to_patch[t], sum(maps) / len(maps)))
        assert expected.max() > 1e-4 * plain.text_to_patch[t].max()
        torch.testing.assert_close(added, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))


def test_fused_attention_of_the_towers_is_restored(small, picture):
    vlm, llm = small()
    relevance(vlm, llm, picture, PROMPT, ANSWER, through_backbone=True)
    blocks = vlm.backbone.blocks
    assert all(block.attn.fused_attn and not block.attn.attn_drop._forward_hooks for block in blocks)
