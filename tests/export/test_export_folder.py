"""One folder with everything in it: read back in a fresh process, elsewhere, with nothing else at hand."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import prism_deco
from prism_deco.api import Model
from prism_deco.cli import main
from prism_deco.config import load_config
from prism_deco.config.choices import CONF_DIR
from prism_deco.errors import UsageError
from prism_deco.export import save_transformers
from prism_deco.export.card import _header, _licence, _parts, _scores
from prism_deco.export.folder import portable

LLMS = ["mini_qwen2", "mini_phi", "mini_llama"]
TALK = [{"role": "user", "content": "<image>\nWhat color is it?"}, {"role": "assistant", "content": "red"}]
PROBE = """
import sys, torch, prism_deco
from prism_deco.sequence import build_batch
from PIL import Image
talk = [{"role": "user", "content": "<image>\\nWhat color is it?"}, {"role": "assistant", "content": "red"}]
for folder in sys.argv[1:]:
    model = prism_deco.load(folder)
    tokens = torch.stack(model.encode_images([Image.new("RGB", (50, 70), (200, 30, 30))]))
    batch = build_batch([model.llm.encode(talk, num_images=1)], tokens.shape[1])
    with torch.no_grad():
        torch.save(model.vlm.logits(model.vlm.hidden_states(batch, tokens)), f"{folder}.pt")
"""


def logits(model: Model) -> torch.Tensor:
    from prism_deco.sequence import build_batch

    tokens = torch.stack(model.encode_images([Image.new("RGB", (50, 70), (200, 30, 30))]))
    batch = build_batch([model.llm.encode(TALK, num_images=1)], tokens.shape[1])
    with torch.no_grad():
        return model.vlm.logits(model.vlm.hidden_states(batch, tokens))


@pytest.mark.slow
def test_a_fresh_process_gives_bit_equal_logits(random_model, tmp_path):
    expected = {}
    for llm in LLMS:
        small = ["projector=qformer", "projector.hidden_dim=24", "projector.ffn_dim=48"]
        config, vlm, language = random_model("mini_siglip", f"llm={llm}", *small)
        model = Model(vlm, language, config)
        model.save(tmp_path / llm)
        expected[llm] = logits(model)
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PROBE, *(str(tmp_path / llm) for llm in LLMS)]
    subprocess.run(command, check=True, env=environment | {"HF_HUB_OFFLINE": "1"})
    for llm in LLMS:
        found = torch.load(tmp_path / f"{llm}.pt", weights_only=True)
        assert torch.equal(found, expected[llm]) and found.abs().max() > 0


def test_it_holds_the_tower_and_refers_to_no_place_of_this_machine(random_model, towers, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    config, vlm, llm = random_model(
        "clip", "data=llava", f"data.json={tmp_path}/data/train.json", f"runs_dir={tmp_path}"
    )
    config.llm.weights, config.backbone.weights = f"{tmp_path}/llm.gguf", "~/tower.safetensors"
    model = Model(vlm, llm, config)
    model.save(tmp_path / "export")
    for file in (tmp_path / "export").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file
    kept = portable(config)
    assert (kept.data.json, kept.llm.weights, kept.backbone.weights) == ("train.json", "llm.gguf", "tower.safetensors")
    expected = logits(model)
    moved = shutil.move(tmp_path / "export", tmp_path / "elsewhere")
    monkeypatch.chdir("/")
    loaded = prism_deco.load(moved)
    assert torch.equal(logits(loaded), expected)
    tower = load_file(moved / "backbone.safetensors")
    assert sum(t.numel() for t in tower.values()) == sum(p.numel() for p in vlm.backbone.parameters())
    record = json.loads((moved / "backbone.json").read_text())
    assert record["transform"]["tiny_clip"]["image_size"] == 32
    assert not any(p.requires_grad for p in loaded.vlm.backbone.parameters())


def test_a_pretrained_tower_is_included_and_not_looked_for(random_model, tmp_path, monkeypatch):
    config, vlm, llm = random_model("mini_siglip")
    expected = logits(Model(vlm, llm, config))
    Model(vlm, llm, config).save(tmp_path / "export")
    monkeypatch.setattr("prism_deco.backbones.tower.locate", lambda *args: pytest.fail("it looked for the weights"))
    assert torch.equal(logits(prism_deco.load(tmp_path / "export")), expected)


def test_shards(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip")
    model = Model(vlm, llm, config)
    model.save(tmp_path / "export", max_shard_size="1MB")
    shards = sorted((tmp_path / "export").glob("model-*.safetensors"))
    assert len(shards) >= 3 and all(shard.stat().st_size < 1.1e6 for shard in shards)
    assert torch.equal(logits(prism_deco.load(tmp_path / "export")), logits(model))
    modes = {file.stat().st_mode for file in (tmp_path / "export").glob("*.*")}
    assert len(modes) == 1, "who may read the README may read the weights"
    index = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())["weight_map"]
    shards[0].unlink()
    with pytest.raises(ValueError, match=shards[0].name):
        prism_deco.load(tmp_path / "export")
    assert {"projector.mlp.0.weight"} <= index.keys()


def test_tied_tables_are_stored_once_and_tied_again(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip", "llm=mini_qwen2")
    Model(vlm, llm, config).save(tmp_path / "export")
    with safe_open(tmp_path / "export" / "model.safetensors", "pt") as file:
        assert len({"lm.lm_head.weight", "lm.model.embed_tokens.weight"} & set(file.keys())) == 1
    lm = prism_deco.load(tmp_path / "export").vlm.lm
    assert lm.get_input_embeddings().weight is lm.get_output_embeddings().weight


def test_an_llm_without_an_architecture_in_its_yaml(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip", "llm=mini_llama")
    config.llm.architecture = None
    model = Model(vlm, llm, config)
    model.save(tmp_path / "export")
    assert torch.equal(logits(prism_deco.load(tmp_path / "export")), logits(model))


def test_a_folder_with_something_in_it_is_left_alone(random_model, tmp_path, capsys):
    config, vlm, llm = random_model("mini_siglip")
    model = Model(vlm, llm, config)
    model.save(tmp_path / "export")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="is not empty"):
        model.save(tmp_path / "export")
    assert main(["export", str(tmp_path / "export"), "--to", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_half_precision_halves_the_files_and_keeps_the_rotary_frequencies(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip", "recipe.standardise_features=true")
    model = Model(vlm, llm, config)
    model.save(tmp_path / "full")
    assert main(["export", str(tmp_path / "full"), "--to", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half")]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.02)
    half = prism_deco.load(tmp_path / "half")
    assert {p.dtype for p in half.vlm.parameters()} == {torch.bfloat16}
    rotary = half.vlm.lm.model.rotary_emb.inv_freq
    assert torch.equal(rotary, 1 / 10000 ** (torch.arange(0, 32, 2) / 32))
    full = logits(model)
    assert (logits(half).float() - full).abs().max() < 0.05 * full.abs().max()


def test_another_transform_than_in_training_is_an_error(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip")
    Model(vlm, llm, config).save(tmp_path / "export")
    file = tmp_path / "export" / "backbone.json"
    file.write_text(file.read_text().replace("letterbox", "pad"))
    (file.parent / "SHA256SUMS").unlink()
    with pytest.raises(ValueError, match="trained on images prepared by"):
        prism_deco.load(tmp_path / "export")


def test_adapters_are_merged(random_model, tmp_path):
    pytest.importorskip("peft")
    config, vlm, llm = random_model(
        "clip", "llm=mini_llama", "recipe.lm=lora", "recipe.lora_r=4", "recipe.lora_alpha=8"
    )
    for name, parameter in vlm.lm.named_parameters():
        if "lora_B" in name:  # zero at first: no update at all
            torch.nn.init.normal_(parameter, std=0.1)
    model = Model(vlm, llm, config)
    before = logits(model)
    with torch.no_grad():
        weight = vlm.lm.model.layers[0].self_attn.q_proj
        by_hand = weight.base_layer.weight + 2 * weight.lora_B["default"].weight @ weight.lora_A["default"].weight
    model.save(tmp_path / "export")
    loaded = prism_deco.load(tmp_path / "export")
    assert loaded.config.recipe.lm == "full"
    torch.testing.assert_close(loaded.vlm.lm.model.layers[0].self_attn.q_proj.weight, by_hand)
    torch.testing.assert_close(logits(loaded), before, rtol=1e-4, atol=1e-4)
    save_transformers(tmp_path / "hf", config, vlm, llm)
    assert (tmp_path / "hf" / "model.safetensors").is_file()


def test_a_tower_with_buffers_that_no_file_holds(random_model, tmp_path):
    """Rotary frequencies of a DINOv3 tower are computed anew."""
    tower = tmp_path / "tower.yaml"
    tower.write_text("family: dinov2\nmodel: vit_small_patch16_dinov3\npretrained: false\nimage_size: 32\n")
    config, vlm, llm = random_model(str(tower))
    model = Model(vlm, llm, config)
    model.save(tmp_path / "export")
    loaded = prism_deco.load(tmp_path / "export")
    assert torch.equal(logits(loaded), logits(model))
    with pytest.raises(ValueError, match="its tower is a Eva"):
        save_transformers(tmp_path / "hf", config, vlm, llm)


def test_a_damaged_file_of_an_export_is_named(random_model, tmp_path):
    config, vlm, llm = random_model("siglip")
    Model(vlm, llm, config).save(tmp_path / "ours")
    save_transformers(tmp_path / "theirs", config, vlm, llm)
    for folder in ("ours", "theirs"):
        subprocess.run(["sha256sum", "-c", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / folder, check=True)
    weights = tmp_path / "ours" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UsageError, match="model.safetensors was damaged or replaced"):
        prism_deco.load(tmp_path / "ours")


@pytest.mark.parametrize("options", [[], ["--hf"]])
def test_the_card_tells_what_the_run_knows(random_model, tmp_path, options):
    """Read by the hub's own library; numbers as a run writes them."""
    config, vlm, llm = random_model("siglip", "data=llava_v1_5_mix665k", "run_id=a-run")
    Model(vlm, llm, config).save(tmp_path / "run" / "model")
    (tmp_path / "run" / "manifest.json").write_text(json.dumps({"data_hash": "0123abcd"}))
    for name, value in (("pope", 85.512), ("pope-adversarial", 80.0)):
        metrics = {"benchmark": "pope", "primary": "accuracy", "metrics": {"accuracy": value, "f1": 1.0}}
        folder = tmp_path / "run" / "eval" / name
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps(metrics | {"interval95": [79.25, 86.75], "n": 3000}))
    assert main(["export", str(tmp_path / "run"), "--to", str(tmp_path / "out"), *options]) == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == ("transformers" if options else "prism_deco")
    found = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert found == {"pope": 85.512, "pope-adversarial": 80.0} and card.data.model_name == "a-run"
    for line in (
        "| pope | accuracy | 85.5 | 79.2 to 86.8 | 3000 |",
        "`llava_v1_5_mix665k`, hash `0123abcd`",
        f"| parameters | {sum(p.numel() for p in vlm.parameters()):,} |",
        "- data `llava_v1_5_mix665k`: see https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
        "- LLM `mini_qwen2`: see the page of its source",
    ):
        assert line in card.text, line


def test_the_card_states_licences_and_base_models_of_pretrained_weights_only():
    """What the YAMLs of shipped choices say; nothing about weights of one's own."""
    shipped = load_config(["backbone=dinov3_siglip2_384", "llm=llama3_2_1b_instruct", "run_id=a"])
    lines = [_licence(group, part) for group in ("backbone", "llm") for part in _parts(shipped, group)]
    assert [line.partition("`: ")[2] for line in lines] == ["DINOv3", "Apache-2.0", "Llama 3.2 Community"]
    header = ModelCard(_header("transformers", shipped, None) + "text").data
    assert len(header.base_model) == 3 and header.base_model[2] == "meta-llama/Llama-3.2-1B-Instruct"
    own = load_config(["backbone=clip_vit_l_336", "llm=phi2", "llm.weights=mine", "run_id=a"])
    lines = [_licence(group, part) for group in ("backbone", "llm") for part in _parts(own, group)]
    assert lines[0].endswith("see https://huggingface.co/timm/vit_large_patch14_clip_336.openai")
    assert lines[1] == "- LLM `phi2`: see the page of its source"
    assert ModelCard(_header("transformers", own, None) + "text").data.base_model == [
        "timm/vit_large_patch14_clip_336.openai"
    ]


def test_a_licence_is_stated_of_the_repository_that_the_shipped_yaml_names(tmp_path):
    own = tmp_path / "qwen3_0_6b.yaml"
    own.write_text((CONF_DIR / "llm" / own.name).read_text().replace("hub: Qwen/Qwen3-0.6B", "hub: acme/own"))
    for llm, hub in ((["llm=qwen3_0_6b", "llm.hub=acme/tuned"], "acme/tuned"), ([f"llm={own}"], "acme/own")):
        config = load_config(["backbone=siglip2_b_512", "backbone.hub=acme/tower", "run_id=a", *llm])
        lines = [_licence(group, part) for group in ("backbone", "llm") for part in _parts(config, group)]
        assert lines == [
            "- vision tower `siglip2_b_512`: see https://huggingface.co/acme/tower",
            f"- LLM `qwen3_0_6b`: see https://huggingface.co/{hub}",
        ]


def test_the_card_names_the_sets_of_a_mixture(tmp_path):
    own = tmp_path / "birds.yaml"
    own.write_text("family: hub\nrepo: acme/birds\nfiles: '*'\nrevision: main\n")
    sets = f"{{a: {{data: hub, repo: acme/cats, weight: 2}}, b: {{data: llava}}, c: {{data: {own}}}}}"
    config = load_config(["data=mixture", f"data.mixture={sets}", "run_id=a"])
    lines = [
        "- data `a: hub`: see https://huggingface.co/datasets/acme/cats",
        "- data `b: llava`: see the page of its source",
        "- data `c: birds`: see https://huggingface.co/datasets/acme/birds",
    ]
    assert [_licence("data", part) for part in _parts(config, "data")] == lines
    own.unlink()
    lines[2] = "- data `c: birds`: see the page of its source"
    assert [_licence("data", part) for part in _parts(config, "data")] == lines, "an export does not hold the file"


def test_names_of_the_users_own_are_no_markup(random_model, tmp_path):
    config, vlm, llm = random_model("mini_siglip", "data=hub", "data.repo=acme/x](y)<b>")
    config.run_id = "a\n\n# Title <img src=x>"
    Model(vlm, llm, config).save(tmp_path / "export")
    text = ModelCard.load(tmp_path / "export" / "README.md").text
    assert "# a # Title &lt;img src=x&gt;\n" in text and "\n# Title" not in text
    assert "/datasets/acme/x%5D%28y%29%3Cb%3E\n" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval95": None}, "interval95 is None, not two numbers"),
        ({"interval95": [1.0]}, "interval95 is [1.0], not two numbers"),
        ({"interval95": [1.0, "x"]}, "interval95 is [1.0, 'x'], not two numbers"),
        ({"metrics": {"accuracy": "high"}}, "it has no value of its primary metric, accuracy"),
        ({"metrics": {"accuracy": float("nan")}}, "it has no value of its primary metric, accuracy"),
        ({"metrics": None}, "it has no value of its primary metric, accuracy"),
        ({"primary": "f1"}, "it has no value of its primary metric, f1"),
        ({"primary": ["f1"]}, "it has no value of its primary metric, ['f1']"),
    ],
)
def test_damaged_scores_are_named(tmp_path, change, message):
    sound = {"benchmark": "x", "primary": "accuracy", "metrics": {"accuracy": 5}, "interval95": [1.0, 9.0], "n": 3}
    path = tmp_path / "eval" / "x" / "metrics.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(sound))
    assert _scores(tmp_path) == {"x": sound}
    path.write_text(json.dumps(sound | change))
    with pytest.raises(UsageError) as refusal:
        _scores(tmp_path)
    assert str(path) in str(refusal.value) and message in str(refusal.value)
