"""timm's Eva (DINOv3, EVA-02, Perception Encoder) as a tower, and what is said of models without a patch grid."""

import pytest
import timm
import torch
from safetensors.torch import save_file

from prism_deco.backbones import build_backbone

EVA = [
    # Model, input size, side of the grid, width, registers and class token, mean of the normalisation.
    ("vit_large_patch16_dinov3.lvd1689m", 256, 16, 1024, 5, (0.485, 0.456, 0.406)),
    ("vit_small_patch16_dinov3.lvd1689m", 256, 16, 384, 5, (0.485, 0.456, 0.406)),
    ("vit_pe_core_tiny_patch16_384.fb", 384, 24, 192, 1, (0.5, 0.5, 0.5)),
    ("vit_pe_spatial_base_patch16_512.fb", 512, 32, 768, 1, (0.5, 0.5, 0.5)),
    ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 336, 24, 192, 1, (0.48145466, 0.4578275, 0.40821073)),
]


def tower(model: str, family: str = "dinov2", **options):
    return build_backbone({"name": "tower", "family": family, "model": model}, **options)


@pytest.mark.parametrize(("model", "size", "side", "width", "prefix", "mean"), EVA)
@pytest.mark.parametrize("larger", [False, True])
def test_grid_and_width(model, size, side, width, prefix, mean, larger):
    image_size = size * 2 if larger else None
    grid = (side * 2, side * 2) if larger else (side, side)
    backbone = tower(model, pretrained=False, device="meta", image_size=image_size)
    assert (backbone.grid, backbone.embed_dim, backbone.image_size) == (grid, width, size * (1 + larger))
    pixels = torch.empty(2, 3, backbone.image_size, backbone.image_size, device="meta")
    assert backbone({"tower": pixels}).shape == (2, grid[0] * grid[1], width)
    assert timm.create_model(model, pretrained=False, device="meta").num_prefix_tokens == prefix
    assert backbone.transform.towers["tower"].mean == mean


@pytest.mark.parametrize(
    "model", ["vit_small_patch16_dinov3", "vit_pe_core_tiny_patch16_384", "eva02_tiny_patch14_224"]
)
@pytest.mark.parametrize("scale", [1, 2])
def test_features_are_those_of_timm(model, scale, tmp_path):
    """The output of the second-to-last block, computed by a loop of our own over timm's model."""
    torch.manual_seed(0)
    vit = timm.create_model(model, pretrained=False, num_classes=0).eval()
    save_file({name: tensor.contiguous() for name, tensor in vit.state_dict().items()}, tmp_path / "tower.safetensors")
    size = vit.patch_embed.img_size[0] * scale
    backbone = tower(model, weights=str(tmp_path / "tower.safetensors"), image_size=size)
    assert not any(tensor.is_meta for tensor in (*backbone.parameters(), *backbone.buffers()))
    if scale > 1:
        vit.set_input_size((size, size))
    pixels = torch.randn(1, 3, size, size)
    with torch.no_grad():
        x, rotary = vit._pos_embed(vit.patch_embed(pixels))
        x = vit.norm_pre(x)
        for block in vit.blocks[:-1]:
            x = block(x, rope=rotary)
        expected = x[:, vit.num_prefix_tokens :]
        torch.testing.assert_close(backbone({"tower": pixels}), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "model", "kind"),
    [
        ("dinov2", "resnet50", "ResNet"),
        ("dinov2", "convnext_tiny", "ConvNeXt"),
        ("dinov2", "swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("dinov2", "beit_base_patch16_224", "Beit"),
        ("dinov2", "samvit_base_patch16", "VisionTransformerSAM"),
        ("dinov2", "naflexvit_base_patch16_gap", "NaFlexVit"),
        ("clip", "RN50", "ModifiedResNet"),
        ("clip", "convnext_base", "ConvNeXt"),
    ],
)
def test_a_model_without_a_patch_grid_is_named(family, model, kind):
    with pytest.raises(ValueError, match=f"{model} is a {kind}.*VisionTransformer"):
        tower(model, family, pretrained=False, device="meta")
