"""Loading a BLIP-2 checkpoint, written here in the key layouts of LAVIS and of transformers."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prism_deco.projectors import build_projector
from prism_deco.projectors.qformer_weights import load_qformer

IN_DIM, DIM, FFN, TOKENS = 10, 12, 20, 9
LAYERS = 3  # one more than the projector has


def lavis(in_dim: int = IN_DIM, tokens: int = TOKENS, ffn: int = FFN) -> dict[str, torch.Tensor]:
    """Random weights under LAVIS' names: a stage-1 model with its tower, text layers and heads."""
    shapes: dict[str, tuple[int, ...]] = {
        "query_tokens": (1, tokens, DIM),
        "ln_vision.weight": (in_dim,),
        "ln_vision.bias": (in_dim,),
        "visual_encoder.blocks.0.attn.qkv.weight": (3 * in_dim, in_dim),
        "Qformer.bert.embeddings.word_embeddings.weight": (30, DIM),
        "Qformer.bert.embeddings.LayerNorm.weight": (DIM,),
        "Qformer.bert.embeddings.LayerNorm.bias": (DIM,),
        "Qformer.cls.predictions.bias": (30,),
        "vision_proj.weight": (4, DIM),
    }
    for index in range(LAYERS):
        layer = f"Qformer.bert.encoder.layer.{index}"
        linears = {f"attention.self.{part}": (DIM, DIM) for part in ("query", "key", "value")}
        linears["attention.output.dense"] = (DIM, DIM)
        norms = ["attention.output.LayerNorm", "output.LayerNorm", "output_query.LayerNorm"]
        if index % 2 == 0:
            linears |= {"crossattention.self.query": (DIM, DIM), "crossattention.output.dense": (DIM, DIM)}
            linears |= {f"crossattention.self.{part}": (DIM, in_dim) for part in ("key", "value")}
            norms.append("crossattention.output.LayerNorm")
        for suffix in ("", "_query"):
            linears |= {f"intermediate{suffix}.dense": (ffn, DIM), f"output{suffix}.dense": (DIM, ffn)}
        for name, shape in linears.items():
            shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
        for name in norms:
            shapes |= {f"{layer}.{name}.weight": (DIM,), f"{layer}.{name}.bias": (DIM,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def transformers_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for key, tensor in weights.items():
        if key.startswith("Qformer.cls") or "word_embeddings" in key:
            continue
        key = key.replace("Qformer.bert.embeddings.LayerNorm", "qformer.layernorm").replace("Qformer.bert", "qformer")
        key = key.replace("attention.self.", "attention.attention.")
        renamed[key.replace("ln_vision", "vision_model.post_layernorm")] = tensor
    return renamed


def save(path: Path, weights: dict[str, torch.Tensor]) -> str:
    torch.save({"model": weights, "optimizer": {"state": {}}, "epoch": 3}, path)
    return str(path)


def build(weights: str | None, **options):
    options = {"hidden_dim": DIM, "heads": 3, "ffn_dim": FFN} | options
    return build_projector("qformer", IN_DIM, 6, (4, 5), TOKENS, weights=weights, **options)


def check_layers(projector, weights, skip: tuple[str, ...] = ()) -> None:
    """Everything below the readout equals the checkpoint, but for `skip`."""
    pairs = [
        ("attention.attention.query", "attention.self.query"),
        ("attention.attention.key", "attention.self.key"),
        ("attention.attention.value", "attention.self.value"),
        ("attention.output.dense", "attention.output.dense"),
        ("attention.output.LayerNorm", "attention.output.LayerNorm"),
        ("intermediate_query.dense", "intermediate_query.dense"),
        ("output_query.dense", "output_query.dense"),
        ("output_query.LayerNorm", "output_query.LayerNorm"),
    ]
    cross = [(f"cross{ours}", f"cross{theirs}") for ours, theirs in pairs[:5]]
    for index in (0, 1):
        layer = projector.body.encoder.layer[index]
        for ours, theirs in pairs + (cross if index == 0 else []):
            for kind in ("weight", "bias"):
                key = f"Qformer.bert.encoder.layer.{index}.{theirs}.{kind}"
                if not any(part in key for part in skip):
                    assert torch.equal(layer.get_parameter(f"{ours}.{kind}"), weights[key]), key
    assert torch.equal(projector.body.layernorm.weight, weights["Qformer.bert.embeddings.LayerNorm.weight"])
    assert torch.equal(projector.body.layernorm.bias, weights["Qformer.bert.embeddings.LayerNorm.bias"])


def test_everything_fits(tmp_path, caplog):
    weights = lavis()
    with caplog.at_level(logging.INFO):
        projector = build(save(tmp_path / "blip2.pth", weights))
    check_layers(projector, weights)
    assert torch.equal(projector.queries, weights["query_tokens"])
    assert torch.equal(projector.input_norm.weight, weights["ln_vision.weight"])
    assert torch.equal(projector.input_norm.bias, weights["ln_vision.bias"])
    expected = [name for name in projector.state_dict() if not name.startswith("readout.")]
    unused = sum(key.startswith("Qformer.") for key in weights) - (len(expected) - 3)  # queries and input norm
    assert f"{len(expected)} tensors taken, {unused} unused" in caplog.text
    assert "re-initialised" not in caplog.text


def test_patches_are_normalised(tmp_path):
    projector = build(save(tmp_path / "blip2.pth", lavis())).eval()
    plain = build(None).eval()
    plain.load_state_dict({k: v for k, v in projector.state_dict().items() if not k.startswith("input_norm.")})
    features = torch.randn(2, 20, IN_DIM)
    normal = torch.nn.functional.layer_norm(
        features, (IN_DIM,), projector.input_norm.weight, projector.input_norm.bias, eps=1e-5
    )
    torch.testing.assert_close(projector(features), plain(normal))


@pytest.mark.parametrize("layout", ["lavis.pth", "lavis.safetensors", "transformers", "transformers_bin"])
def test_files_folders_and_layouts(tmp_path, layout):
    weights = lavis()
    if layout == "lavis.safetensors":
        save_file(weights, tmp_path / layout)
        path = tmp_path / layout
    elif layout == "lavis.pth":
        path = save(tmp_path / layout, weights)
    else:
        path = tmp_path
        names = transformers_names(weights)
        halves = [dict(list(names.items())[:20]), dict(list(names.items())[20:])]
        for index, half in enumerate(halves, start=1):
            if layout == "transformers":
                save_file(half, tmp_path / f"model-0000{index}-of-00002.safetensors")
            else:
                torch.save(half, tmp_path / f"pytorch_model-0000{index}-of-00002.bin")
        (tmp_path / "config.json").write_text("{}")
    projector = build(str(path))
    check_layers(projector, weights)
    assert torch.equal(projector.queries, weights["query_tokens"])
    assert torch.equal(projector.input_norm.weight, weights["ln_vision.weight"])
    assert load_qformer(projector, Path(path)) == {}


def test_other_patch_width_and_query_count(tmp_path):
    """The release for EVA-g (another width), and 32 queries instead of ours: those parts start afresh."""
    weights = lavis(in_dim=IN_DIM + 4, tokens=4)
    torch.manual_seed(1)
    path = save(tmp_path / "blip2.pth", weights)
    projector = build(path)
    torch.manual_seed(1)
    fresh = build(None)
    check_layers(projector, weights, skip=("crossattention.self.key", "crossattention.self.value"))
    ours, untouched = projector.state_dict(), fresh.state_dict()
    cross = "body.encoder.layer.0.crossattention.attention"
    for name in ("queries", f"{cross}.key.weight", f"{cross}.value.weight", f"{cross}.key.bias", f"{cross}.value.bias"):
        assert ours[name].shape == untouched[name].shape
    assert not ours[f"{cross}.key.bias"].any() and ours[f"{cross}.key.weight"].std() < 0.05
    assert torch.equal(ours["queries"], untouched["queries"])
    assert torch.equal(ours["input_norm.weight"], torch.ones(IN_DIM))
    reasons = load_qformer(projector, Path(path))
    assert set(reasons) == {
        "queries",
        "input_norm.weight",
        "input_norm.bias",
        *(f"{cross}.{part}.{kind}" for part in ("key", "value") for kind in ("weight", "bias")),
    }
    assert reasons["queries"] == "checkpoint [1, 4, 12], here [1, 9, 12]"
    assert reasons[f"{cross}.key.weight"] == "checkpoint [12, 14], here [12, 10]"


def test_checkpoint_without_layer_norm_or_queries(tmp_path):
    weights = {key: tensor for key, tensor in lavis().items() if not key.startswith(("ln_vision", "query_tokens"))}
    path = save(tmp_path / "blip2.pth", weights)
    reasons = load_qformer(build(path), Path(path))
    assert set(reasons) == {"queries", "input_norm.weight", "input_norm.bias"}
    assert reasons["queries"].startswith("checkpoint absent")


def test_other_geometry_is_refused(tmp_path):
    path = save(tmp_path / "blip2.pth", lavis(ffn=FFN + 1))
    with pytest.raises(ValueError, match=r"intermediate_query.*\[21, 12\], here \[20, 12\].*ffn_dim"):
        build(path)
    path = save(tmp_path / "shallow.pth", lavis())
    with pytest.raises(ValueError, match=r"layer\.3\..*absent.*depth"):
        build(path, depth=4)


def test_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="no Q-Former"):
        build(save(tmp_path / "tower.pth", {"visual_encoder.weight": torch.zeros(1)}))
    with pytest.raises(ValueError, match=r"missing\.pth: expected a checkpoint"):
        build(str(tmp_path / "missing.pth"))


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"model": {"query_tokens": Payload()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth cannot be read.*objects other than tensors"):
        build(str(tmp_path / "evil.pth"))
    assert not (tmp_path / "ran").exists()
