"""Other models of timm (DINOv3, EVA-02, Perception Encoder, AIMv2) as towers, and what is said of models without a grid
of patches."""

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import eva, generate_default_cfgs, register_model, vision_transformer
from timm.models._hub import save_for_hf

from prism_deco.backbones import build_backbone
from prism_deco.config import load_choice
from prism_deco.export.vision import vision_model

EVA = [
    # Model, input size, side of the grid, width, registers and class token, mean of the normalisation.
    ("vit_large_patch16_dinov3.lvd1689m", 256, 16, 1024, 5, (0.485, 0.456, 0.406)),
    ("vit_small_patch16_dinov3.lvd1689m", 256, 16, 384, 5, (0.485, 0.456, 0.406)),
    ("vit_pe_core_tiny_patch16_384.fb", 384, 24, 192, 1, (0.5, 0.5, 0.5)),
    ("vit_pe_spatial_base_patch16_512.fb", 512, 32, 768, 1, (0.5, 0.5, 0.5)),
    ("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 336, 24, 192, 1, (0.48145466, 0.4578275, 0.40821073)),
]


default_cfgs = generate_default_cfgs(
    {f"tiny_{name}": {"input_size": (3, size, size)} for name, size in (("dinov3", 64), ("pe", 56), ("aimv2", 56))}
)
SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2}


@register_model
def tiny_dinov3(pretrained=False, **options):
    return eva.vit_large_patch16_dinov3(**(SMALL | {"img_size": 64} | options))


@register_model
def tiny_pe(pretrained=False, **options):
    return eva.vit_pe_lang_large_patch14_448(**(SMALL | {"img_size": 56, "ref_feat_shape": (4, 4)} | options))


@register_model
def tiny_aimv2(pretrained=False, **options):
    return vision_transformer.aimv2_large_patch14_336(**(SMALL | {"img_size": 56} | options))


def tower(model: str, family: str = "timm", **options):
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


@pytest.mark.parametrize("side", [4, 6])
@pytest.mark.parametrize(
    ("choice", "model", "patch", "tap"),
    [("dinov3_l_256", "tiny_dinov3", 16, 2), ("pe_lang_l_448", "tiny_pe", 14, 3), ("aimv2_l_336", "tiny_aimv2", 14, 2)],
)
def test_hub_files_give_what_timm_computes(choice, model, patch, tap, side, tmp_path):
    """The architectures of these choices, narrow, with random weights in a file as timm writes it for the hub, against
    timm's `forward_intermediates` at the size of the weights and at another one."""
    torch.manual_seed(0)
    vit = timm.create_model(model).eval()
    for parameter in vit.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # no zeros, ones or equal scales
    save_for_hf(vit, tmp_path, safe_serialization=True)
    content = load_choice("backbone", choice) | {"model": model, "weights": str(tmp_path / "model.safetensors")}
    backbone = build_backbone(content, image_size=side * patch)
    assert backbone.grid == (side, side)
    vit.set_input_size((side * patch, side * patch))
    pixels = torch.randn(2, 3, side * patch, side * patch)
    with torch.no_grad():
        [expected] = vit.forward_intermediates(pixels, indices=[tap], output_fmt="NLC", intermediates_only=True)
        torch.testing.assert_close(backbone({choice: pixels}), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (2, side * side, 64)
    with pytest.raises(ValueError, match="its tower"):
        vision_model(backbone)  # transformers' LLaVA has CLIP and SigLIP


@pytest.mark.parametrize(
    ("family", "model", "kind"),
    [
        ("timm", "resnet50", "ResNet"),
        ("timm", "convnext_tiny", "ConvNeXt"),
        ("timm", "swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("timm", "beit_base_patch16_224", "Beit"),
        ("timm", "samvit_base_patch16", "VisionTransformerSAM"),
        ("timm", "naflexvit_base_patch16_gap", "NaFlexVit"),
        ("clip", "RN50", "ModifiedResNet"),
        ("clip", "convnext_base", "ConvNeXt"),
    ],
)
def test_a_model_without_a_patch_grid_is_named(family, model, kind):
    with pytest.raises(ValueError, match=f"{model} is a {kind}.*VisionTransformer"):
        tower(model, family, pretrained=False, device="meta")
