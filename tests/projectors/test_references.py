"""Projectors of other models against those models' own modules in transformers, or against slow loops: the numbers of
their parameters at published sizes, and what they compute with the same weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Gemma3Config,
    Idefics2Config,
    Idefics2PerceiverConfig,
    Idefics3Config,
    InternVLConfig,
    LlavaOnevisionConfig,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel, InternVLMultiModalProjector
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig
from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

from prism_deco.projectors import Projector, build_projector

IDEFICS3 = {"norm": None, "mlp_depth": 1, "mlp_bias": False}
QWEN2_VL = {"norm": "patch", "mlp_ratio": 1}
GEMMA3 = {"norm": True, "mlp_depth": 1, "mlp_bias": False}
UNEVEN = ((7, 5), (3, 3))
"""Overlapping windows of 3x2 and 3x3 patches."""


def internvl(width: int, out: int) -> nn.Module:
    config = InternVLConfig()
    config.vision_config.hidden_size, config.text_config.hidden_size = width, out
    return InternVLMultiModalProjector(config)


def idefics3(width: int, out: int, factor: int) -> nn.Module:
    config = Idefics3Config(scale_factor=factor)
    config.vision_config.hidden_size, config.text_config.hidden_size = width, out
    return Idefics3Connector(config)


def gemma3(width: int, out: int, side: int, tokens: int) -> nn.Module:
    config = Gemma3Config(mm_tokens_per_image=tokens)
    config.vision_config.hidden_size, config.text_config.hidden_size = width, out
    config.vision_config.image_size, config.vision_config.patch_size = side, 1
    return Gemma3MultiModalProjector(config)


def molmo2(width: int, layers: int, heads: int, ffn: int, out: int) -> nn.Module:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = Molmo2AdapterConfig(
        vision_feature_layer=list(range(layers)),
        head_dim=width // heads,
        intermediate_size=ffn,
        text_hidden_size=out,
        **sizes,
    )
    config._attn_implementation = "eager"
    return Molmo2Adapter(config).eval()


def idefics2(width: int, out: int, ffn: int, tokens: int, **perceiver: int) -> nn.Module:
    config = Idefics2Config(
        perceiver_config=Idefics2PerceiverConfig(hidden_size=out, resampler_n_latents=tokens, **perceiver)
    )
    config.vision_config.hidden_size = width
    config.text_config.hidden_size, config.text_config.intermediate_size = out, ffn
    config.perceiver_config.hidden_size = out
    config.text_config.hidden_act = "silu"
    return Idefics2Connector(config).eval()


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# Each: the sizes of a release, its module in transformers where there is one, the number.
RELEASES = {
    # InternViT-300M and Qwen2.5-0.5B
    "InternVL3-1B": ("pixel_shuffle", 1024, 896, (32, 32), 256, {}, lambda: internvl(1024, 896), 4_482_816),
    "Qwen2-VL-7B": ("pixel_shuffle", 1280, 3584, (24, 24), 144, QWEN2_VL, lambda: PatchMerger(3584, 1280), 44_575_744),
    "Idefics3-8B": ("pixel_shuffle", 1152, 4096, (26, 26), 169, IDEFICS3, lambda: idefics3(1152, 4096, 2), 18_874_368),
    # SigLIP2-B/16 at 512 px, SmolLM2-360M; its file has the bias-free matrix of Idefics3
    "nanoVLM": ("pixel_shuffle", 768, 960, (32, 32), 64, IDEFICS3, lambda: idefics3(768, 960, 4), 11_796_480),
    "Gemma-3-4B": ("avgpool", 1152, 2560, (64, 64), 256, GEMMA3, lambda: gemma3(1152, 2560, 64, 256), 2_950_272),
    # Two layers of SigLIP2-so400m; Qwen3-8B, whose feed-forward layers have 12288 hidden channels
    "Molmo2-8B": (
        *("window_attention", 2304, 4096, (27, 27), 196, {}),
        *(lambda: molmo2(1152, 2, 16, 12288, 4096), 87_937_536),
    ),
    "Idefics2-8B": (
        *("resampler", 1152, 4096, (70, 70), 64, {}),
        *(lambda: idefics2(1152, 4096, 14336, 64), 743_219_200),
    ),
    "MobileVLM-V2-1.7B": ("ldp_v2", 1024, 2048, (24, 24), 144, {}, None, 6_316_032),
    "TokenPacker-7B": (
        *("token_packer", 4096, 4096, (24, 24), 144, {"extra_layers": (11, 15, 21)}),
        *(None, 1024**2 + 2 * (4096 * 1024 + 1024**2 + 2048) + 3 * 2048 + 4 * (1024**2 + 1024) + 20_979_712),
    ),
}


@pytest.mark.parametrize("release", RELEASES)
def test_parameters_at_published_sizes(release):
    name, in_dim, out_dim, grid, tokens, options, reference, expected = RELEASES[release]
    with torch.device("meta"):
        ours = count(build_projector(name, in_dim, out_dim, grid, tokens, **options))
        theirs = count(reference()) if reference else expected
    assert ours == theirs == expected


def test_the_table_of_releases_is_published():
    page = (Path(__file__).parents[2] / "runs/reference/README.md").read_text(encoding="utf-8")
    for release, (name, in_dim, out_dim, grid, tokens, _, reference, expected) in RELEASES.items():
        sizes = f"{grid[0]}x{grid[1]} of {in_dim:,} to {tokens} of {out_dim:,}"
        way = "its module in transformers" if reference else "a slow loop"
        assert f"| {release} | `{name}` | {sizes} | {expected:,} | {way} |\n" in page


def small(name: str, in_dim: int, out_dim: int, grid: tuple[int, int], tokens: int, **options) -> Projector:
    torch.manual_seed(0)
    projector = build_projector(name, in_dim, out_dim, grid, tokens, **options).eval()
    with torch.no_grad():
        for parameter in projector.parameters():  # norms, too
            parameter.add_(0.1 * torch.randn_like(parameter))
    return projector


def features(in_dim: int, grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(2, grid[0] * grid[1], in_dim, generator=torch.Generator().manual_seed(1))


def load(module: nn.Module, projector: Projector, names: dict[str, str]) -> nn.Module:
    """The reference with our weights; `names` maps its own prefixes to ours, longest first."""
    ours = projector.state_dict()
    state = {}
    for key in module.state_dict():
        prefix = next(prefix for prefix in names if key.startswith(prefix))
        state[key] = ours[names[prefix] + key.removeprefix(prefix)]
    assert len(state) == len(ours)
    module.load_state_dict(state)
    return module


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-7)


@torch.no_grad()
def test_pixel_shuffle_is_internvl_s():
    projector = small("pixel_shuffle", 12, 10, (8, 8), 16)
    x = features(12, (8, 8))
    reference = load(
        internvl(12, 10), projector, {"layer_norm": "window_norm", "linear_1": "mlp.0", "linear_2": "mlp.2"}
    )
    shuffled = InternVLModel.pixel_shuffle(None, x.reshape(2, 8, 8, 12), 0.5).flatten(1, 2)
    close(projector(x), reference(shuffled))


@torch.no_grad()
def test_pixel_shuffle_is_idefics3_s():
    projector = small("pixel_shuffle", 12, 10, (9, 9), 9, **IDEFICS3)
    x = features(12, (9, 9))
    close(projector(x), load(idefics3(12, 10, 3), projector, {"modality_projection.proj": "mlp.0"})(x))


@torch.no_grad()
def test_pixel_shuffle_is_qwen2_vl_s_merger():
    projector = small("pixel_shuffle", 12, 10, (4, 4), 4, **QWEN2_VL)
    x = features(12, (4, 4))
    merger = load(PatchMerger(10, 12), projector, {"ln_q": "patch_norm", "mlp": "mlp"})
    in_blocks = x.reshape(2, 2, 2, 2, 2, 12).transpose(
        2, 3
    )  # the merger takes the patches of a block one after another
    close(projector(x).flatten(0, 1), merger(in_blocks))


@torch.no_grad()
def test_avgpool_with_a_norm_is_gemma_3_s():
    projector = small("avgpool", 12, 10, (8, 8), 16, **GEMMA3)
    x = features(12, (8, 8))
    reference = gemma3(12, 10, 8, 16)
    state = projector.state_dict()
    # Its norm multiplies by 1 + weight, and its matrix is transposed.
    reference.load_state_dict(
        {"mm_soft_emb_norm.weight": state["norm.weight"] - 1, "mm_input_projection_weight": state["mlp.0.weight"].T}
    )
    close(projector(x), reference(x))


@torch.no_grad()
@pytest.mark.parametrize("side, tokens", [(8, 16), (7, 16)])
def test_resizing_behind_the_mlp_is_llava_onevision_s(side, tokens):
    projector = small("bilinear", 12, 10, (side, side), tokens, after_mlp=True)
    x = features(12, (side, side))
    model = type("Model", (), {"config": LlavaOnevisionConfig()})()
    model.config.vision_config.image_size, model.config.vision_config.patch_size = side, 1
    close(projector(x), LlavaOnevisionModel.apply_pooling(model, projector.mlp(x)))


@torch.no_grad()
def test_pooling_behind_the_mlp():
    projector = small("avgpool", 12, 10, (8, 6), 4, after_mlp=True)
    x = features(12, (8, 6))
    patches = projector.mlp(x).reshape(2, 8, 6, 10).permute(0, 3, 1, 2)
    close(projector(x), F.adaptive_avg_pool2d(patches, 2).flatten(2).mT)


@torch.no_grad()
def test_window_attention_is_molmo2_s():
    projector = small("window_attention", 24, 10, (8, 8), 16, heads=3, hidden_dim=12, ffn_dim=20)
    x = features(24, (8, 8))
    names = {
        f"image_pooling_2d.{own}_proj": f"attention.{ours}"
        for own, ours in zip("qkvo", ("query", "key", "value", "out"), strict=True)
    }
    names |= {f"image_projector.{part}_proj": f"readout.{part}" for part in ("gate", "up", "down")}
    reference = load(molmo2(12, 2, 3, 20, 10), projector, names)
    numbers = torch.arange(2 * 64).reshape(2, 4, 2, 4, 2).transpose(2, 3).reshape(32, 4)
    close(projector(x).flatten(0, 1), reference(x, numbers).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("grid", [(6, 6), (5, 7)])
def test_the_resampler_is_idefics2_s(grid):
    heads = {"depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6}
    projector = small("resampler", 12, 10, grid, 9, ffn_dim=20, **heads)
    x = features(12, grid)
    theirs = {"resampler_depth": 2, "resampler_n_heads": 4, "num_key_value_heads": 2, "resampler_head_dim": 6}
    names = {f"modality_projection.{part}_proj": f"input.{part}" for part in ("gate", "up", "down")}
    names |= {"perceiver_resampler": "body"}
    reference = load(idefics2(12, 10, 20, 9, **theirs), projector, names)
    close(projector(x), reference(x, torch.ones(x.shape[:2], dtype=torch.bool)))


def window(size: int, out: int, index: int) -> range:
    """The patches of a window along one side, by torch's formula for adaptive pooling."""
    return range(math.floor(index * size / out), math.ceil((index + 1) * size / out))


def windows(grid: tuple[int, int], out: tuple[int, int]) -> list[list[int]]:
    """The patches of each window, row-major."""
    return [
        [row * grid[1] + column for row in window(grid[0], out[0], i) for column in window(grid[1], out[1], j)]
        for i, j in ((i, j) for i in range(out[0]) for j in range(out[1]))
    ]


@torch.no_grad()
def test_smaller_windows_of_pixel_shuffle_are_filled_up_with_zeros():
    grid, _ = UNEVEN
    projector = small("pixel_shuffle", 4, 6, grid, 9)
    x = features(4, grid)
    for m, (i, j) in enumerate((i, j) for i in range(3) for j in range(3)):
        block = torch.zeros(2, 3, 3, 4)
        rows, columns = window(7, 3, i), window(5, 3, j)
        for r, row in enumerate(rows):
            for c, column in enumerate(columns):
                block[:, r, c] = x[:, row * 5 + column]
        largest = block[:, : max(len(window(7, 3, k)) for k in range(3)), : max(len(window(5, 3, k)) for k in range(3))]
        merged = projector.window_norm(largest.flatten(1))
        close(projector(x)[:, m], projector.mlp(merged))


@torch.no_grad()
@pytest.mark.parametrize("grid, out", [((8, 8), (4, 4)), UNEVEN])
def test_window_attention_by_loops(grid, out):
    projector = small("window_attention", 8, 10, grid, out[0] * out[1], heads=3, hidden_dim=12, ffn_dim=20)
    x, attention = features(8, grid), projector.attention
    for m, patches in enumerate(windows(grid, out)):
        for image in range(2):
            inside = x[image, patches]
            query, key, value = attention.query(inside.mean(dim=0)), attention.key(inside), attention.value(inside)
            mixed = []
            for head in range(3):
                own = slice(4 * head, 4 * head + 4)
                weights = ((key[:, own] @ query[own]) / 2).softmax(dim=0)
                mixed.append(weights @ value[:, own])
            close(projector(x)[image, m], projector.readout(attention.out(torch.cat(mixed))))


@torch.no_grad()
@pytest.mark.parametrize("grid, out", [((8, 8), (4, 4)), UNEVEN])
def test_token_packer_with_torch_s_attention_and_resizing(grid, out):
    projector = small("token_packer", 16, 10, grid, out[0] * out[1], extra_layers=(0, 1, 2), heads=2, hidden_dim=8)
    x, ours = features(16, grid), projector.attention
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.in_proj_weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
    attention.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key.bias, ours.value.bias]))
    attention.out_proj.load_state_dict(ours.out.state_dict())
    last = x[..., 12:].reshape(2, *grid, 4).permute(0, 3, 1, 2)
    coarse = F.interpolate(last, size=out, mode="bilinear").flatten(2).mT
    query = F.layer_norm(coarse @ projector.query[0].weight.T, (8,), *projector.query[1].parameters(), eps=1e-6)
    key, value = projector.key(x), projector.value(x)
    for m, patches in enumerate(windows(grid, out)):
        mixed, _ = attention(query[:, m : m + 1], key[:, patches], value[:, patches])
        close(projector(x)[:, m], projector.readout(mixed[:, 0]))


@torch.no_grad()
def test_ldp_v2_by_loops():
    grid, out = UNEVEN
    projector = small("ldp_v2", 4, 6, grid, 9)
    x = features(4, grid)
    first, second = projector.mlp[0], projector.mlp[2]
    hidden = x @ first.weight.T + first.bias
    patches = (hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2) @ second.weight.T + second.bias
    pooled = torch.stack([patches[:, inside].mean(dim=1) for inside in windows(grid, out)], dim=1).reshape(2, 3, 3, 6)
    padded = F.pad(pooled, (0, 0, 1, 1, 1, 1))
    weight = projector.position.weight[:, 0]
    for i in range(3):
        for j in range(3):
            around = padded[:, i : i + 3, j : j + 3]
            expected = pooled[:, i, j] + torch.einsum("brce,erc->be", around, weight) + projector.position.bias
            close(projector(x)[:, 3 * i + j], expected)


def test_features_of_another_number_of_layers_are_refused():
    with pytest.raises(ValueError, match="16 channels are not those of 3 layers"):
        build_projector("token_packer", 16, 8, (4, 4), 4, extra_layers=(1, 2))


def test_latents_start_apart():
    latents = build_projector("resampler", 8, 12, (4, 4), 4).body.latents
    assert (latents[0] - latents[1]).abs().min() > 0
