"""Shapes and counts of the shipped towers on the meta device, and what every backbone promises."""

from __future__ import annotations

import logging

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from prism_deco.backbones import BACKBONES, build_backbone
from prism_deco.config import choices, load_choice

# Parameters up to and including the second-to-last block, without norms, pools and heads after it.
REAL = [
    ("clip_vit_l_336", 336, 24, 1024, 23, 290_909_184),
    ("siglip_so400m_224", 224, 16, 1152, 26, 397_200_544),
    ("siglip_so400m_384", 384, 27, 1152, 26, 397_745_440),
    ("dinov2_l_384", 384, 27, 1024, 23, 291_115_008),
    ("dinov2_siglip_384", 384, 27, 1024 + 1152, 23 + 26, 291_115_008 + 397_745_440),
]
# Width, blocks and patches per side by the model cards of google/siglip2-*, facebook/dinov3-vitl16-*, facebook/PE-*,
# apple/aimv2-* and openai/clip-vit-base-patch16; millions of parameters of the whole vision model by timm's results/
# benchmark-infer-amp-nchw-pt291-cu128-4090.csv, of Perception Encoder by its README (0.32 billion; the language-aligned
# one is without its last block and its attention pool); and the blocks used.
PUBLISHED = [
    ("siglip2_so400m_384", 1152, 27, 27, 428.23, 26),
    ("siglip2_b_512", 768, 12, 32, 93.52, 11),
    ("dinov3_l_256", 1024, 24, 16, 303.08, 23),
    ("pe_core_l_336", 1024, 24, 24, 317.15, 23),
    ("pe_lang_l_448", 1024, 23, 32, 291.42, 23),
    ("aimv2_l_336", 1024, 24, 24, 309.53, 23),
    ("clip_vit_b_224", 768, 12, 14, 86.19, 11),
]
MINI = ["mini_clip", "mini_siglip", "mini_dinov2", "mini_dinov2_siglip"]


@pytest.fixture(params=MINI)
def mini(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return build_backbone(request.param, pretrained=False)


@pytest.mark.parametrize(("choice", "size", "side", "dim", "blocks", "count"), REAL)
def test_real_towers(choice, size, side, dim, blocks, count):
    backbone = build_backbone(choice, pretrained=False, device="meta")
    assert backbone.image_size == size
    assert backbone.grid == (side, side)
    assert backbone.num_patches == side * side
    assert backbone.embed_dim == dim
    assert len(backbone.blocks) == blocks
    assert sum(p.numel() for p in backbone.parameters()) == count
    pixels = {tower: torch.empty(2, 3, size, size, device="meta") for tower in backbone.towers}
    assert backbone(pixels).shape == (2, side * side, dim)


@pytest.mark.parametrize(("choice", "dim", "depth", "side", "millions", "used"), PUBLISHED)
def test_published_towers(choice, dim, depth, side, millions, used):
    """The weights that the choice names belong to a model of the published size, and its tower is that model but for
    what comes after the last block used."""
    backbone = build_backbone(choice, pretrained=False, device="meta")
    assert (backbone.embed_dim, backbone.grid, len(backbone.blocks)) == (dim, (side, side), used)
    pixels = {choice: torch.empty(2, 3, backbone.image_size, backbone.image_size, device="meta")}
    assert backbone(pixels).shape == (2, side * side, dim)
    hub = load_choice("backbone", choice)["hub"].removeprefix("timm/").replace("clip_224", "clip_quickgelu_224")
    whole = timm.create_model(hub, pretrained=False, device="meta")
    assert round(sum(p.numel() for p in whole.parameters()) / 1e6, 2) == millions
    assert len(whole.blocks) == depth
    before = [p for n, p in whole.named_parameters() if not n.startswith(("norm.", "head.", "attn_pool.", "fc_norm."))]
    unused = [p for block in whole.blocks[used:] for p in block.parameters()]
    count = sum(p.numel() for p in before) - sum(p.numel() for p in unused)
    assert sum(p.numel() for p in backbone.parameters()) == count


def test_every_yaml_builds_at_its_own_name():
    for choice in choices("backbone"):
        backbone = build_backbone(choice, pretrained=False, device="meta")
        assert load_choice("backbone", choice)["family"] in BACKBONES.names()
        assert len(backbone.towers) > 1 or backbone.towers == (choice,)


def test_clip_runs_quick_gelu_and_siglip_the_exact_one():
    kinds = {
        choice: {
            type(module).__name__
            for module in build_backbone(choice, pretrained=False, device="meta").modules()
            if "GELU" in type(module).__name__
        }
        for choice in ("clip_vit_l_336", "siglip_so400m_384", "dinov2_l_384")
    }
    assert kinds == {"clip_vit_l_336": {"QuickGELU"}, "siglip_so400m_384": {"GELU"}, "dinov2_l_384": {"GELU"}}


def test_siglip_names_version_1_weights():
    for choice in ("siglip_so400m_224", "siglip_so400m_384"):
        assert load_choice("backbone", choice)["hub"].endswith(".webli")


@pytest.mark.parametrize("choice", [row[0] for row in REAL])
def test_another_resolution(choice):
    backbone = build_backbone(choice, pretrained=False, device="meta", image_size=448)
    assert (backbone.image_size, backbone.grid) == (448, (32, 32))
    pixels = {tower: torch.empty(1, 3, 448, 448, device="meta") for tower in backbone.towers}
    assert backbone(pixels).shape == (1, 32 * 32, backbone.embed_dim)
    assert next(iter(backbone.transform.towers.values())).image_size == 448


def test_sizes_between_patches_are_floored_and_logged(caplog):
    with caplog.at_level(logging.INFO, logger="prism_deco"):
        backbone = build_backbone("mini_siglip", pretrained=False, image_size=70)
    assert backbone.grid == (8, 8)
    assert "the last 6 px are not read" in caplog.text
    pixels = torch.rand(1, 3, 70, 70)
    assert backbone({"mini_siglip": pixels}).shape == (1, 64, 96)


@pytest.mark.parametrize("choice", ["siglip_so400m_384", "dinov2_l_384"])
def test_the_last_6_of_384_px_are_not_read(choice):
    """The stride of the patch embedding floors 384 / 14 to 27: pixels from 378 on have no effect."""
    backbone = build_backbone(choice, pretrained=False, device="meta")
    embed = backbone.trunk.vit.patch_embed.proj
    assert embed(torch.empty(1, 3, 384, 384, device="meta")).shape[-2:] == (27, 27)
    assert embed(torch.empty(1, 3, 378, 378, device="meta")).shape[-2:] == (27, 27)


def test_smaller_than_a_patch_is_an_error():
    for choice in ("clip_vit_l_336", "siglip_so400m_224", "dinov2_l_384"):
        with pytest.raises(ValueError, match="image_size=13 is smaller than one patch of 14 px"):
            build_backbone(choice, pretrained=False, device="meta", image_size=13)


def test_frozen_for_good(mini):
    mini.train()
    assert not any(module.training for module in mini.modules())
    assert not any(p.requires_grad for p in mini.parameters())
    assert {p.dtype for p in mini.parameters()} == {torch.float32}
    assert not list(mini.buffers())


def test_image_to_features(mini):
    pixels = {k: v[None] for k, v in mini.transform(Image.new("RGB", (80, 50), (200, 30, 30))).items()}
    features = mini(pixels)
    assert (mini.image_size, mini.grid) == (64, (8, 8))
    assert features.shape == (1, 64, mini.embed_dim)
    assert features.isfinite().all()


def test_bfloat16(mini):
    pixels = {tower: torch.rand(2, 3, 64, 64) for tower in mini.towers}
    exact = mini(pixels)
    rough = mini.to(torch.bfloat16)(pixels)
    assert rough.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: a few per cent after some layers.
    assert (rough.float() - exact).norm() / exact.norm() < 0.03


@pytest.mark.parametrize("choice", MINI[:3])
def test_features_are_the_output_of_the_second_to_last_block(choice):
    """Against a hook on the same tower that keeps all its blocks; prefix tokens dropped, no norm."""
    torch.manual_seed(0)
    whole = build_backbone(choice, pretrained=False, layer=-1)
    torch.manual_seed(0)
    cut = build_backbone(choice, pretrained=False)
    assert (len(whole.blocks), len(cut.blocks)) == (4, 3)
    seen: list[torch.Tensor] = []
    whole.blocks[2].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    pixels = {choice: torch.rand(2, 3, 64, 64)}
    whole(pixels)
    torch.testing.assert_close(cut(pixels), seen[0][:, -64:], rtol=0, atol=0)
    assert seen[0].shape[1] == 64 + (5 if choice == "mini_dinov2" else 0)


def test_nothing_after_the_tap_is_kept(mini):
    names = [name for name, _ in mini.named_parameters()]
    assert not [n for n in names if "attn_pool" in n or ".head" in n or ".vit.norm." in n or ".blocks.3." in n]


def test_order_is_row_major():
    """A change in the image's second row of patches, sixth column, shows most in feature 1 * 8 + 5."""
    torch.manual_seed(0)
    backbone = build_backbone("mini_siglip", pretrained=False)
    before = torch.zeros(1, 3, 64, 64)
    after = before.clone()
    after[:, :, 10:14, 42:46] = 3.0
    change = (backbone({"mini_siglip": after}) - backbone({"mini_siglip": before})).norm(dim=-1)[0]
    assert change.argmax() == 1 * 8 + 5


def test_layer_is_an_axis():
    backbone = build_backbone("mini_siglip", pretrained=False, layer=0)
    assert len(backbone.blocks) == 1
    with pytest.raises(ValueError, match="layer=4 is outside this tower of 4 blocks"):
        build_backbone("mini_siglip", pretrained=False, layer=4)


def test_wrong_pixels_are_named():
    backbone = build_backbone("mini_siglip", pretrained=False)
    with pytest.raises(ValueError, match="No pixels for the towers mini_siglip"):
        backbone({"mini_clip": torch.rand(1, 3, 64, 64)})
    with pytest.raises(ValueError, match=r"\[batch, 3, 64, 64\] and got \[1, 3, 32, 32\]"):
        backbone({"mini_siglip": torch.rand(1, 3, 32, 32)})


def test_ensemble_concatenates_in_the_order_of_its_yaml():
    torch.manual_seed(0)
    ensemble = build_backbone("mini_dinov2_siglip", pretrained=False)
    torch.manual_seed(0)
    parts = [build_backbone(name, pretrained=False) for name in ("mini_dinov2", "mini_siglip")]
    image = Image.new("RGB", (64, 64), (10, 200, 30))
    pixels = {k: v[None] for k, v in ensemble.transform(image).items()}
    assert list(pixels) == ["mini_dinov2", "mini_siglip"]
    assert not torch.equal(pixels["mini_dinov2"], pixels["mini_siglip"])
    expected = torch.cat([part({k: v[None] for k, v in part.transform(image).items()}) for part in parts], dim=-1)
    torch.testing.assert_close(ensemble(pixels), expected, rtol=0, atol=0)


def test_ensembles_of_unequal_grids_are_an_error():
    choice = {"name": "odd", "family": "ensemble", "towers": ["clip_vit_l_336", "siglip_so400m_224"]}
    with pytest.raises(ValueError, match="clip_vit_l_336 24x24, siglip_so400m_224 16x16.*grid: 24"):
        build_backbone(choice, pretrained=False, device="meta")
    with pytest.raises(ValueError, match=r"backbone\.grid=16 sets .* leave out backbone\.image_size"):
        build_backbone(choice | {"grid": 16}, pretrained=False, device="meta", image_size=224)


def test_any_two_towers_make_an_ensemble():
    """Patches of 16 and 14 px: one grid is two image sizes. A tower whose own YAML names a layer keeps it."""
    backbone = build_backbone("dinov3_siglip2_384", pretrained=False, device="meta")
    assert (backbone.grid, backbone.embed_dim, backbone.image_size) == ((27, 27), 1024 + 1152, 27 * 16)
    assert {name: t.image_size for name, t in backbone.transform.towers.items()} == {
        "dinov3_l_256": 27 * 16,
        "siglip2_so400m_384": 27 * 14,
    }
    choice = {"name": "two", "family": "ensemble", "towers": ["pe_lang_l_448", "clip_vit_b_224"], "grid": 20}
    backbone = build_backbone(choice, pretrained=False, device="meta", layer=-3)
    assert (backbone.grid, backbone.embed_dim, len(backbone.blocks)) == ((20, 20), 1024 + 768, 23 + 10)
    pixels = {"pe_lang_l_448": (1, 3, 280, 280), "clip_vit_b_224": (1, 3, 320, 320)}
    features = backbone({name: torch.empty(shape, device="meta") for name, shape in pixels.items()})
    assert features.shape == (1, 400, 1024 + 768)


def test_three_towers_in_another_order():
    choice = {"name": "three", "family": "ensemble", "towers": ["siglip_so400m_224", "clip_vit_l_336", "dinov2_l_384"]}
    backbone = build_backbone(choice, pretrained=False, device="meta", image_size=224, layer=-3)
    assert backbone.towers == ("siglip_so400m_224", "clip_vit_l_336", "dinov2_l_384")
    assert (backbone.grid, backbone.embed_dim) == ((16, 16), 1152 + 1024 + 1024)
    assert len(backbone.blocks) == 25 + 22 + 22


def test_hash_sees_names_values_and_dtypes(mini):
    first = mini.sha256()
    assert first == mini.sha256()
    weight = next(mini.parameters())
    kept = weight.view(-1)[0].item()
    weight.view(-1)[0] += 1
    assert mini.sha256() != first
    weight.view(-1)[0] = kept
    assert mini.sha256() == first
    assert mini.to(torch.bfloat16).sha256() != first


def test_unknown_names():
    with pytest.raises(ValueError, match="mini_siglip"):
        build_backbone("mini_siglipp")
    with pytest.raises(ValueError, match="Unknown backbone family 'clipp'. Did you mean 'clip'"):
        build_backbone({"name": "x", "family": "clipp"})
    with pytest.raises(ValueError, match="Unknown open_clip model"):
        build_backbone({"name": "x", "family": "clip", "model": "ViT-L-14-337"}, pretrained=False)
    with pytest.raises(ValueError, match="Unknown timm model"):
        build_backbone({"name": "x", "family": "dinov2", "model": "vit_nowhere"}, pretrained=False)


def test_a_tower_from_outside_needs_only_a_registration():
    from prism_deco.backbones import VisionBackbone

    @BACKBONES.register("test_double")
    class Double(VisionBackbone):
        def __init__(self, name: str, pretrained: bool, device: str | None):
            super().__init__()
            self.layer = nn.Linear(1, 1)

    assert isinstance(build_backbone({"name": "d", "family": "test_double"}), Double)
