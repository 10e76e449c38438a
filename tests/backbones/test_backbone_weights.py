"""One random state in every library's layout gives the same features; what does not fit is named."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from einops import rearrange
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

from prism_deco.backbones import build_backbone, weights
from prism_deco.backbones.layouts import recognise, split_vision

SIZE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 32, 3, 2
default_cfgs = generate_default_cfgs(
    {name: {"input_size": (3, SIZE, SIZE), "num_classes": 0} for name in ("tiny_vit_siglip", "tiny_vit_reg")}
)
# Different kernels of the same float32 operations.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def randomised(module: nn.Module) -> nn.Module:
    """Every parameter drawn anew: fresh modules leave biases, LayerScale and tokens at constants."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module.eval()


@pytest.fixture
def tiny_open_clip(tmp_path: Path):
    """Registers open_clip models `tiny-clip` and `tiny-siglip` and timm's `tiny_vit`s for a test."""
    vision = {"image_size": SIZE, "layers": DEPTH, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH}
    text = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
    configs = {
        "tiny-clip": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text},
        "tiny-siglip": {
            "embed_dim": WIDTH,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": SIZE,
                "timm_model_name": "tiny_vit_siglip",
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": text,
        },
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)


@register_model
def tiny_vit_siglip(pretrained: bool = False, **options) -> VisionTransformer:
    return timm_vit("tiny_vit_siglip", {"class_token": False, "global_pool": "map"} | options)


@register_model
def tiny_vit_reg(pretrained: bool = False, **options) -> VisionTransformer:
    return timm_vit("tiny_vit_reg", {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5} | options)


def timm_vit(name: str, options: dict) -> VisionTransformer:
    layout = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    features = {"out_indices": 3, "feature_cls": "getter"}
    return build_model_with_cfg(VisionTransformer, name, False, feature_cfg=features, **(layout | options))


CLIP = {"name": "t", "family": "clip", "model": "tiny-clip"}
SIGLIP = {"name": "t", "family": "siglip", "model": "tiny-siglip"}
DINOV2 = {"name": "t", "family": "dinov2", "model": "tiny_vit_reg"}


def features(choice: dict[str, str], path: Path, **options) -> torch.Tensor:
    backbone = build_backbone(choice, weights=str(path), **options)
    size = backbone.image_size
    return backbone({"t": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))})


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def save_hf(model: transformers.PreTrainedModel, folder: Path, prefix: str = "") -> Path:
    """As `save_pretrained` writes it, optionally with the prefix of published files."""
    model.save_pretrained(folder)
    if prefix:
        file = folder / "model.safetensors"
        save_file({f"{prefix}{k}": v for k, v in load_file(file).items()}, file)
    return folder


@pytest.fixture
def hf_clip():
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="quick_gelu",
    )
    return randomised(transformers.CLIPVisionModel(config))


@pytest.fixture
def hf_siglip():
    config = transformers.SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        hidden_act="gelu",  # the exact one, as in the towers; published configurations say tanh
    )
    return randomised(transformers.SiglipVisionModel(config))


@pytest.fixture
def hf_dinov2():
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIZE,
        patch_size=PATCH,
        num_register_tokens=4,
    )
    return randomised(transformers.Dinov2WithRegistersModel(config))


def hidden(model: nn.Module, prefix: int) -> torch.Tensor:
    """hidden_states[-2]: the output of the second-to-last block, as LLaVA takes it."""
    with torch.no_grad():
        return model(pixel_values=pixels(), output_hidden_states=True).hidden_states[-2][:, prefix:]


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_hugging_face_clip(tiny_open_clip, hf_clip, tmp_path, prefix):
    folder = save_hf(hf_clip, tmp_path / "hf", prefix)
    torch.testing.assert_close(features(CLIP, folder), hidden(hf_clip, 1), **TOLERANCE)


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_hugging_face_siglip(tiny_open_clip, hf_siglip, tmp_path, prefix):
    folder = save_hf(hf_siglip, tmp_path / "hf", prefix)
    torch.testing.assert_close(features(SIGLIP, folder), hidden(hf_siglip, 0), **TOLERANCE)


def test_hugging_face_dinov2(hf_dinov2, tmp_path):
    folder = save_hf(hf_dinov2, tmp_path / "hf")
    torch.testing.assert_close(features(DINOV2, folder), hidden(hf_dinov2, 5), **TOLERANCE)


def test_hugging_face_dinov2_in_its_older_names(hf_dinov2, tmp_path):
    """Published files say attention.attention.query and attention.output.dense."""
    old = {
        re.sub(r"attention\.o_proj", "attention.output.dense", _old_qkv(key)): value.contiguous()
        for key, value in hf_dinov2.state_dict().items()
    }
    assert "encoder.layer.0.attention.attention.query.weight" in old
    save_file(old, tmp_path / "model.safetensors")
    torch.testing.assert_close(features(DINOV2, tmp_path), hidden(hf_dinov2, 5), **TOLERANCE)


def _old_qkv(key: str) -> str:
    for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
        key = key.replace(f"attention.{letter}_proj", f"attention.attention.{word}")
    return key


def test_whole_hugging_face_model(tiny_open_clip, hf_clip, tmp_path):
    """CLIPModel: the text tower beside it is neither loaded nor complained about."""
    config = transformers.CLIPConfig(
        vision_config=hf_clip.config.to_dict(),
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    model.vision_model.load_state_dict(hf_clip.state_dict())
    model.save_pretrained(tmp_path / "hf")
    torch.testing.assert_close(features(CLIP, tmp_path / "hf"), hidden(hf_clip, 1), **TOLERANCE)


def _timm_taps(vit: VisionTransformer) -> torch.Tensor:
    """A hook's view of block -2, before any norm."""
    seen: list[torch.Tensor] = []
    vit.blocks[-2].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with torch.no_grad():
        vit(pixels())
    return seen[0][:, vit.num_prefix_tokens :]


def test_timm_siglip_and_open_clip_siglip(tiny_open_clip, tmp_path):
    model = randomised(open_clip.create_model("tiny-siglip", load_weights=False))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    save_file(model.visual.trunk.state_dict(), tmp_path / "model.safetensors")
    expected = _timm_taps(model.visual.trunk)
    for file in ("open_clip_model.safetensors", "model.safetensors"):
        torch.testing.assert_close(features(SIGLIP, tmp_path / file), expected, **TOLERANCE)


def test_siglip_384_is_one_tower_in_both_libraries(tmp_path):
    """DeCo's authors load it by open_clip, and tap the second-to-last block of its trunk; prismatic loads timm's. Here
    with random weights, and two of the 27 blocks."""
    config = open_clip.get_model_config("ViT-SO400M-14-SigLIP-384")
    with torch.device("meta"):
        theirs = open_clip.model._build_vision_tower(config["embed_dim"], config["vision_cfg"]).trunk
        own = timm.create_model("vit_so400m_patch14_siglip_384", num_classes=0)
    towers = [theirs, own]
    for vit in towers:
        assert len(vit.blocks) == 27
        vit.blocks = vit.blocks[:2]
        vit.to_empty(device="cpu").eval()
    torch.manual_seed(1)
    state = {name: torch.randn_like(value) * 0.04 for name, value in theirs.state_dict().items()}
    image = {"siglip_so400m_384": torch.randn(1, 3, 384, 384)}
    expected = []
    for vit in towers:
        vit.load_state_dict(state)
        with torch.no_grad():
            [found] = vit.get_intermediate_layers(*image.values(), n={len(vit.blocks) - 2})
        expected.append(found)
    assert expected[0].shape == (1, 27 * 27, 1152) and expected[0].std() > 0.1
    assert torch.equal(*expected)
    for prefix in ("", "visual.trunk."):  # as timm names the weights, and as open_clip does
        save_file({f"{prefix}{name}": value for name, value in state.items()}, tmp_path / "weights.safetensors")
        backbone = build_backbone("siglip_so400m_384", weights=str(tmp_path / "weights.safetensors"), layer=0)
        torch.testing.assert_close(backbone(image), expected[0], **TOLERANCE)
    bare = build_backbone("siglip_so400m_384", pretrained=False, device="meta")
    assert (bare.trunk.depth, bare.trunk.taps) == (27, [27 - 2])


def test_timm_clip_and_open_clip_clip(tiny_open_clip, tmp_path):
    """timm's ViT with a pre-norm, a class token and QuickGELU is open_clip's tower under other names."""
    model = randomised(open_clip.create_model("tiny-clip", load_weights=False))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "whole.safetensors")
    layout = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    norm = partial(nn.LayerNorm, eps=1e-5)  # CLIP's; timm's own is 1e-6
    vit = VisionTransformer(**layout, pre_norm=True, num_classes=16, act_layer="quick_gelu", norm_layer=norm).eval()
    vit.load_state_dict(checkpoint_filter_fn(dict(model.state_dict()), vit))
    save_file(vit.state_dict(), tmp_path / "timm.safetensors")
    expected = _timm_taps(vit)
    for file in ("whole.safetensors", "timm.safetensors"):
        torch.testing.assert_close(features(CLIP, tmp_path / file), expected, **TOLERANCE)


def test_original_dinov2_release(tmp_path):
    """Its class token has a position, which timm adds to the token itself."""
    vit = randomised(timm.create_model("tiny_vit_reg"))
    state = dict(vit.state_dict())
    save_file(state, tmp_path / "timm.safetensors")
    released = {k: v for k, v in state.items() if k not in ("reg_token", "pos_embed", "cls_token")}
    shift = torch.randn(1, 1, WIDTH)
    released["register_tokens"] = state["reg_token"]
    released["cls_token"] = state["cls_token"] - shift
    released["pos_embed"] = torch.cat([shift, state["pos_embed"]], dim=1)
    released["mask_token"] = torch.zeros(1, WIDTH)
    torch.save(released, tmp_path / "release.pth")
    expected = _timm_taps(vit)
    torch.testing.assert_close(features(DINOV2, tmp_path / "timm.safetensors"), expected, **TOLERANCE)
    torch.testing.assert_close(features(DINOV2, tmp_path / "release.pth"), expected, **TOLERANCE)


@pytest.mark.parametrize("choice", [CLIP, SIGLIP, DINOV2])
def test_positions_are_resampled_at_load(tiny_open_clip, tmp_path, choice):
    """Against torch's antialiased bicubic interpolation of the patch part of the table."""
    torch.manual_seed(0)
    native = build_backbone(choice, pretrained=False)
    state = {k: torch.randn_like(v) for k, v in native.trunk.vit.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    larger = build_backbone(choice, weights=str(tmp_path), image_size=48)
    assert larger.grid == (6, 6)
    key = "positional_embedding" if "positional_embedding" in state else "pos_embed"
    table, got = (part.reshape(-1, WIDTH) for part in (state[key], larger.trunk.vit.state_dict()[key]))
    prefix = len(table) - 16
    image = rearrange(table[prefix:], "(h w) d -> 1 d h w", h=4)
    image = nn.functional.interpolate(image, size=(6, 6), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(got[prefix:], rearrange(image, "1 d h w -> (h w) d"))
    torch.testing.assert_close(got[:prefix], table[:prefix])


def test_half_precision_files_are_read_as_float32(tiny_open_clip, tmp_path):
    state = build_backbone(SIGLIP, pretrained=False).trunk.vit.state_dict()
    save_file({k: v.half() for k, v in state.items()}, tmp_path / "model.safetensors")
    backbone = build_backbone(SIGLIP, weights=str(tmp_path))
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    assert not any(p.requires_grad or p.is_meta for p in backbone.parameters())


def test_sharded_folder(tiny_open_clip, hf_clip, tmp_path):
    hf_clip.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    torch.testing.assert_close(features(CLIP, tmp_path), hidden(hf_clip, 1), **TOLERANCE)


def test_what_does_not_fit_is_named(tiny_open_clip, tmp_path):
    file = tmp_path / "model.safetensors"
    state = dict(build_backbone(SIGLIP, pretrained=False).trunk.vit.state_dict())
    save_file({k: v for k, v in state.items() if k != "blocks.1.mlp.fc1.bias"}, file)
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.mlp\.fc1\.bias"):
        build_backbone(SIGLIP, weights=str(file))
    save_file(state | {"blocks.1.extra": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.1\.extra"):
        build_backbone(SIGLIP, weights=str(file))
    save_file(state | {"blocks.7.norm1.weight": torch.zeros(WIDTH)}, file)
    with pytest.raises(ValueError, match=r"unexpected: blocks\.7\.norm1\.weight"):
        build_backbone(SIGLIP, weights=str(file))
    save_file(state | {"blocks.0.norm1.weight": torch.zeros(5)}, file)
    with pytest.raises(ValueError, match=r"wrong shape: blocks\.0\.norm1\.weight \[5\] instead of \[32\]"):
        build_backbone(SIGLIP, weights=str(file))
    save_file({f"visual.trunk.{k}": v for k, v in state.items()} | {"stranger.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"unexpected: stranger\.weight"):
        build_backbone(SIGLIP, weights=str(file))
    save_file({"a.b": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match=r"no known vision tower .* a\.b"):
        build_backbone(SIGLIP, weights=str(file))


def test_the_weights_of_another_family_are_refused(tiny_open_clip, hf_siglip, tmp_path):
    with pytest.raises(ValueError, match="missing: .*class_embedding"):
        build_backbone(CLIP, weights=str(save_hf(hf_siglip, tmp_path / "hf")))


def test_pickled_code_is_not_run(tiny_open_clip, tmp_path):
    torch.save({"x": Path("x")}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="which are not unpickled"):
        build_backbone(SIGLIP, weights=str(tmp_path / "bad.pth"))
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="contains a list, not a state dict"):
        build_backbone(SIGLIP, weights=str(tmp_path / "list.pth"))


def test_checkpoints_of_training_scripts(tiny_open_clip, tmp_path):
    """open_clip saves {"state_dict": ...}, from several devices with "module." before each name; and an old format."""
    model = randomised(open_clip.create_model("tiny-siglip", load_weights=False))
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    file = tmp_path / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": state}, file, _use_new_zipfile_serialization=False)
    torch.testing.assert_close(features(SIGLIP, file), _timm_taps(model.visual.trunk), **TOLERANCE)


def test_missing_files_say_what_is_wanted(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise OSError("no network")

    monkeypatch.setattr(weights, "hf_hub_download", refuse)
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_args: None)
    with pytest.raises(ValueError) as error:
        build_backbone("clip_vit_l_336")
    for part in ("model.safetensors", "timm/vit_large_patch14_clip_336.openai", "1.2 GB", "backbone.weights=PATH"):
        assert part in str(error.value)
    with pytest.raises(ValueError, match="no weights of clip_vit_l_336 at .*nowhere"):
        build_backbone("clip_vit_l_336", weights=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="expected one weight file in the folder and found none"):
        build_backbone("clip_vit_l_336", weights=str(tmp_path))


def test_the_hub_is_asked_for_the_file_of_the_yaml(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(weights, "try_to_load_from_cache", lambda *_args: None)
    monkeypatch.setattr(weights, "hf_hub_download", lambda *args: asked.append(args) or str(tmp_path / "file"))
    assert weights.locate("x", None, "owner/repo", "model.safetensors", 1.0) == tmp_path / "file"
    assert asked == [("owner/repo", "model.safetensors")]


def test_weights_of_a_yaml_may_lie_in_the_home_folder(monkeypatch, tmp_path):
    (tmp_path / "tower.safetensors").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights.locate("x", "~/tower.safetensors", None, None, None) == tmp_path / "tower.safetensors"


def test_ensemble_reads_a_folder_per_tower(tmp_path):
    states = {}
    for name in ("mini_dinov2", "mini_siglip"):
        states[name] = build_backbone(name, pretrained=False).trunk.vit.state_dict()
        save_file(states[name], tmp_path / f"{name}.safetensors")
    (tmp_path / "mini_siglip.json").write_text("{}")  # a record beside the weights is no weights
    ensemble = build_backbone("mini_dinov2_siglip", weights=str(tmp_path))
    for member, state in zip(ensemble.members, states.values(), strict=True):
        for key, value in member.trunk.vit.state_dict().items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=0)
    (tmp_path / "mini_siglip.safetensors").unlink()
    with pytest.raises(ValueError, match="has no weights for the tower mini_siglip"):
        build_backbone("mini_dinov2_siglip", weights=str(tmp_path))


def test_loading_on_the_meta_device_is_refused():
    with pytest.raises(ValueError, match="pretrained=False"):
        build_backbone("mini_siglip", device="meta")


def test_wrappers_around_the_tower_are_seen_through():
    vision, stray = split_vision(["module.visual.trunk.blocks.0.norm1.weight", "module.logit_scale", "module.odd"])
    assert vision == {"blocks.0.norm1.weight": "module.visual.trunk.blocks.0.norm1.weight"}
    assert stray == ["module.odd"]
    layout = recognise(vision)
    assert layout is not None and layout.name == "timm"
