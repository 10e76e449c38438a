"""Trained towers: what learns and at which rate, what stays as it was, and what a run keeps of it."""

import json

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from torch import nn

import prism_deco
from prism_deco.backbones import build_backbone
from prism_deco.build import build_model, tune_tower
from prism_deco.cli import main
from prism_deco.config import load_choice, load_config
from prism_deco.config.schema import RecipeConfig
from prism_deco.llms.layers import checkpoint_activations
from prism_deco.sequence import Batch, build_batch
from prism_deco.training.init_from import find_start, start_from
from prism_deco.training.model_folder import save_model
from prism_deco.training.optim import adamw, warmup_cosine

TALK = [{"role": "user", "content": "<image>\nWhat color is it?"}, {"role": "assistant", "content": "red"}]
TEXT = [{"role": "user", "content": "Which color?"}, {"role": "assistant", "content": "red"}]
EVERY_FAMILY = ["mini_siglip", "mini_dinov2_siglip", "clip", "eva"]


def _backbone(name: str) -> dict:
    """A backbone choice: CLIP's own class and timm's Eva have no miniature, so they are built without weights."""
    families = {"clip": ("clip", "ViT-B-32"), "eva": ("dinov2", "eva02_tiny_patch14_224")}
    if name not in families:
        return load_choice("backbone", name) | {"pretrained": False}
    family, model = families[name]
    return {"name": name, "family": family, "model": model, "pretrained": False, "image_size": 56, "layer": 2}


def _recipe(**keys) -> DictConfig:
    return OmegaConf.structured(RecipeConfig(name="test", lora_r=2, **keys))


def _tuned(name: str, **keys):
    torch.manual_seed(0)
    backbone = build_backbone(_backbone(name))
    tune_tower(backbone, _recipe(**keys))
    return backbone


def _pixels(backbone) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sides = {name: t.image_size for name, t in backbone.transform.towers.items()}
    return {name: torch.randn(1, 3, side, side, generator=generator) for name, side in sides.items()}


def _config(*overrides: str) -> DictConfig:
    small = ("recipe.standardise_features=false", "recipe.lora_r=4", "llm.pretrained=false", "recipe.token_scale=null")
    return load_config([*small, *overrides])


def _batch(vlm, llm, talk=TALK) -> Batch:
    pixels, images = _pixels(vlm.backbone), int(talk is TALK)
    return build_batch(
        [llm.encode(talk, num_images=images)], vlm.projector.num_tokens, pixels=pixels if images else None
    )


@torch.no_grad()
def _logits(vlm, llm) -> torch.Tensor:
    return vlm.logits(vlm.hidden_states(_batch(vlm, llm)))


@pytest.mark.parametrize("keys", [{"tower": "full"}, {"tower": "full", "tower_layers": 1}, {"tower": "lora"}], ids=str)
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_gradients_reach_exactly_what_is_listed_as_trained(name, keys):
    """A listed parameter without a gradient would stop gradient synchronisation."""
    backbone = _tuned(name, **keys).train()
    for module in backbone.modules():  # B starts at zero, behind which A has no gradient
        if hasattr(module, "lora_B"):
            nn.init.normal_(module.lora_B["default"].weight)
    backbone(_pixels(backbone)).square().sum().backward()
    parameters = dict(backbone.named_parameters())
    listed = {name for name, p in parameters.items() if p.requires_grad}
    assert {name for name, p in parameters.items() if p.grad is not None and p.grad.abs().sum() > 0} == listed
    plain = dict(build_backbone(_backbone(name), device="meta").named_parameters())
    if keys == {"tower": "full"}:
        assert listed == plain.keys()
    members = [member for member in getattr(backbone, "members", [backbone])]
    last = {f"members.{i}." * (len(members) > 1) + f"trunk.vit.{_path(member)}" for i, member in enumerate(members)}
    if "tower_layers" in keys:
        assert listed == {name for name in plain if any(name.startswith(f"{block}.") for block in last)}
    if keys["tower"] == "lora":
        adapted = {name.partition(".lora_")[0] for name in listed}
        assert {".lora_" in name for name in listed} == {True}
        linear = {n for n, m in backbone.named_modules() if n in adapted and isinstance(m.base_layer, nn.Linear)}
        assert adapted == linear and len(adapted) >= 2 * len(backbone.blocks)


def _path(member) -> str:
    blocks = "transformer.resblocks" if hasattr(member.trunk.vit, "transformer") else "blocks"
    return f"{blocks}.{len(member.blocks) - 1}"


@pytest.mark.parametrize(("name", "layers"), [("clip", {"c_fc", "c_proj"}), ("eva", {"proj", "fc1", "fc2"})])
def test_adapters_are_where_they_have_an_effect(name, layers):
    """Torch's attention, in CLIP, reads the weights of its output layer, and Eva's those of its input layer."""
    backbone = _tuned(name, tower="lora")
    adapted = {
        name.partition(".lora_")[0].rpartition(".")[2] for name in dict(backbone.named_parameters()) if "lora_" in name
    }
    assert adapted == layers
    pixels = _pixels(backbone)
    before = backbone(pixels)
    for layer in [module for module in backbone.modules() if hasattr(module, "lora_B")]:
        with torch.no_grad():
            layer.lora_B["default"].weight.fill_(0.1)
            changed = backbone(pixels)
            assert not torch.equal(changed, before), layer
        before = changed


@pytest.mark.parametrize("policy", ["selective", "full"])
@pytest.mark.parametrize("name", EVERY_FAMILY)
def test_recomputed_activations_give_the_same_gradients(name, policy):
    def gradients(policy):
        backbone = _tuned(name, tower="full").train()
        checkpoint_activations(None, policy, backbone.blocks)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            loss = backbone(_pixels(backbone)).square().mean()
        loss.backward()
        return sum(kept), [p.grad for p in backbone.parameters()]

    most, expected = gradients("none")
    few, found = gradients(policy)
    assert few < most / 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_the_tower_has_groups_and_rates_of_its_own():
    vlm, _ = build_model(_config("recipe.tower=full"))
    recipe = _recipe(lr=1e-3, projector_lr=2e-3, tower_lr=4e-4, weight_decay=0.1, tower="full")
    optimizer = adamw(vlm, recipe)
    groups = {group["name"]: group for group in optimizer.param_groups}
    tower = list(vlm.backbone.parameters())
    by_rule = {True: [p for p in tower if p.ndim > 1], False: [p for p in tower if p.ndim <= 1]}
    for name, decays in (("tower/decay", True), ("tower/no_decay", False)):
        assert {id(p) for p in groups[name]["params"]} == {id(p) for p in by_rule[decays]}
        assert (groups[name]["lr"], groups[name]["weight_decay"]) == (4e-4, 0.1 if decays else 0.0)
    schedule = warmup_cosine(optimizer, total_steps=20, warmup_ratio=0.1)
    for _ in range(20):
        rates = {name: group["lr"] for name, group in groups.items()}
        assert rates["tower/decay"] == rates["tower/no_decay"] == pytest.approx(0.4 * rates["lm/decay"])
        assert rates["projector/decay"] == pytest.approx(2 * rates["lm/decay"])
        optimizer.step()
        schedule.step()
    recipe.tower_lr = None
    assert {group["lr"] for group in adamw(vlm, recipe).param_groups if "tower" in group["name"]} == {1e-3}


def test_a_frozen_tower_leaves_no_graph_and_no_group():
    vlm, llm = build_model(_config())
    assert not vlm.train().features(_batch(vlm, llm).pixels).requires_grad and not vlm.backbone.training
    assert not any("tower" in group["name"] for group in adamw(vlm, _recipe()).param_groups)


@pytest.mark.parametrize("tower", ["full", "lora"])
def test_text_alone_gives_every_trained_weight_a_gradient_of_zero(tower):
    """So that gradient synchronisation, which waits for all of them, goes on; the loss does not change."""
    vlm, llm = build_model(_config(f"recipe.tower={tower}"))
    batch = _batch(vlm, llm, TEXT)
    loss = vlm.train()(batch).total
    loss.backward()
    for part in (vlm.backbone, vlm.projector):
        assert all(p.grad is not None and not p.grad.any() for p in part.parameters() if p.requires_grad)
    assert torch.equal(vlm.eval()(batch).total, loss)


@pytest.mark.parametrize("backbone", ["mini_siglip", "mini_dinov2_siglip"])
@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("tower", ["full", "lora"])
def test_a_trained_tower_comes_back_with_its_run(tmp_path, tower, pretrained, backbone):
    config = _config(f"backbone={backbone}", f"backbone.pretrained={pretrained}", f"recipe.tower={tower}")
    torch.manual_seed(3)
    vlm, llm = build_model(config)
    plain = build_backbone(backbone).sha256()
    with torch.no_grad():
        for parameter in vlm.backbone.parameters():
            if parameter.requires_grad:
                parameter += 0.02 * torch.randn_like(parameter)
    save_model(tmp_path / "model", config, vlm, llm)
    assert (tmp_path / "model" / "backbone.safetensors").exists() == (tower == "full" or not pretrained)
    record = json.loads((tmp_path / "model" / "backbone.json").read_text())["sha256"]
    assert (record == plain) == (tower == "lora" and pretrained)
    model = prism_deco.load(tmp_path)
    assert torch.equal(_logits(model.vlm, llm), _logits(vlm.eval(), llm))
    assert not any(p.requires_grad for p in model.vlm.backbone.parameters())
    expected = _logits(vlm, llm)
    model.save(tmp_path / "whole")  # adapters merged
    again = prism_deco.load(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*adapter*")) and again.config.recipe.tower == "full"
    torch.testing.assert_close(_logits(again.vlm, llm), expected, rtol=1e-4, atol=1e-4)
    # A further run starts from it, trained tower included.
    torch.manual_seed(9)
    later, llm = build_model(config)
    start_from(find_start(tmp_path, config), config, later, llm)
    assert torch.equal(_logits(later.eval(), llm), expected)


def test_a_run_that_would_lose_the_trained_tower_is_refused(tmp_path):
    messages = {
        "full": "trains the whole tower, .* set recipe.tower=full",
        "lora": "only a run with recipe.tower=lora recipe.lora_r=4 .*recipe.tower_layers=None",
    }
    for tower, message in messages.items():
        config = _config(f"recipe.tower={tower}")
        save_model(tmp_path / tower / "model", config, *build_model(config))
        with pytest.raises(ValueError, match=message):
            find_start(tmp_path / tower, _config(f"recipe.start_from={tmp_path / tower}"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recipe.tower=full", "trainer.feature_cache=true"], "trainer.feature_cache=true stores what a frozen tower"),
        (["recipe.tower=lora", "trainer.feature_cache=true"], "recipe.tower=lora changes the tower at every step"),
        (["recipe.tower=full", "recipe.tower_layers=4"], "recipe.tower_layers=4: mini_siglip has 3 blocks"),
        (["recipe.tower=half"], "Unknown recipe.tower 'half'"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read(colors, tmp_path, capsys, overrides, message):
    data = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    assert main(["train", *data, f"runs_dir={tmp_path}", "evaluate.benchmarks=null", *overrides]) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_rates_of_a_frozen_tower_are_said_to_have_no_effect(colors, tmp_path, caplog):
    data = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    arguments = ["train", "--check", *data, f"runs_dir={tmp_path}", "evaluate.benchmarks=null", "recipe.tower_lr=1e-5"]
    for tower in ("frozen", "full"):
        assert main([*arguments, f"recipe.tower={tower}"]) == 0
    assert caplog.text.count("recipe.tower_lr=1e-05 has no effect: recipe.tower=frozen.") == 1


def test_a_real_run_trains_the_last_block_and_leaves_the_rest(colors, tmp_path):
    data = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    options = ["data.val_fraction=0", "evaluate.benchmarks=null", "recipe.global_batch_size=4", "trainer.log_every=1",
               "recipe.tower=full", "recipe.tower_layers=1", "recipe.tower_lr=1e-4", "trainer.preflight=true",
               "trainer.activation_checkpointing=full", f"runs_dir={tmp_path}", "run_id=run"]  # fmt: skip
    assert main(["train", *data, *options]) == 0
    before, after = build_backbone("mini_siglip").state_dict(), load_file(tmp_path / "run/model/backbone.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    last = {name for name in before if name.startswith("trunk.vit.blocks.2.")}
    assert changed <= last and len(changed) >= len(last) - 1  # a key's bias does not change what softmax gives
    params = json.loads((tmp_path / "run" / "manifest.json").read_text())["params"]
    assert params["total"] - params["trained"] == sum(before[name].numel() for name in before.keys() - last)
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {"tower/decay", "tower/no_decay"} <= log[0]["train/lr"].keys()
    model = prism_deco.load(tmp_path / "run")
    state = model.vlm.backbone.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in after.items())


def test_prism_full_is_prism_with_a_trained_tower():
    full, frozen = (load_choice("recipe", name) for name in ("prism_full", "prism"))
    assert full.pop("tower") == "full" and frozen.pop("tower") == "frozen"
    assert full.pop("tower_lr") is full.pop("tower_layers") is None
    assert {key: value for key, value in full.items() if key != "name"} == {
        key: value for key, value in frozen.items() if key != "name"
    }
