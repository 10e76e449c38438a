"""Training FLOPs: the closed form beside torch's counter over a real step, and beside 6 N D by hand."""

import pytest
import torch
import yaml
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from prism_deco.build import build_model
from prism_deco.config import load_choice, load_config
from prism_deco.plan.flops import training_flops
from prism_deco.sequence import Batch

PLAIN = (
    "recipe.turn_mask=causal",
    "recipe.max_logits=null",
    "llm.attention=eager",
)  # the counter knows no fused kernel


@pytest.mark.parametrize(
    "overrides",
    [
        ("llm=mini_qwen2", "projector=avgpool"),
        ("llm=mini_phi", "projector=linear", "backbone=mini_dinov2_siglip"),
        ("llm=mini_llama", "projector=avgpool", "recipe.lm=frozen"),
        ("llm=mini_llama", "projector=maxpool", "recipe.lm=lora", "recipe.lora_r=8"),
        ("llm=mini_qwen2", "projector=linear", "backbone=mini_dinov2_siglip", "recipe.tower=full"),
        ("llm=mini_qwen2", "projector=linear", "recipe.tower=full", "recipe.tower_layers=2"),
        ("llm=mini_qwen2", "projector=linear", "recipe.tower=lora", "recipe.lora_r=8"),
    ],
    ids=" ".join,
)
def test_the_closed_form_is_what_a_step_takes(overrides):
    config = load_config([*overrides, *PLAIN])
    vlm, _ = build_model(config)
    vlm.train()
    rows, length, answers, tokens = 3, 90, 7, vlm.projector.num_tokens
    ids, all_real = torch.full((rows, length), 5), torch.ones(rows, length, dtype=torch.bool)
    labels, visual = torch.full((rows, length), -100), torch.zeros(rows, length, dtype=torch.bool)
    labels[:, -answers:] = 5
    visual[:, 1 : 1 + tokens] = True
    pixels = {
        name: torch.randn(rows, 3, tower.image_size, tower.image_size)
        for name, tower in vlm.backbone.transform.towers.items()
    }
    batch = Batch(ids, labels, visual, all_real, torch.arange(length).expand(rows, length), ids, pixels)
    # The tower's attention would be a fused kernel, too.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        vlm(batch).total.backward()
    flops = training_flops(config)
    got = flops.step(images=rows, positions=rows * length, pairs=rows * length**2, targets=rows * answers)
    assert got == pytest.approx(counter.get_total_flops(), rel=0.005)


def test_a_projector_with_convolutions_costs_three_forward_passes_but_for_its_input():
    config = load_config(["projector=c_abstractor", "projector.hidden_dim=96"])
    vlm, _ = build_model(config, device="meta")
    features = torch.empty(1, vlm.backbone.num_patches, vlm.backbone.embed_dim, device="meta")
    with FlopCounterMode(display=False) as counter:
        vlm.projector(features)
    assert training_flops(config).projector == pytest.approx(3 * counter.get_total_flops(), rel=0.01)


def test_six_n_d_for_vicuna():
    flops = training_flops(load_config(["llm=vicuna_7b_v1_5"]))
    # Per layer q, k, v, o of 4096 x 4096 and three matrices of 4096 x 11008; 32 layers; 32064 rows in the head.
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert flops.position == 6 * matrices
    assert flops.target == 6 * 4096 * 32064
    # Scores and weighted sum: 2 * 4096 multiplications and additions each per pair and layer; twice that backward.
    assert flops.pair == 3 * 4 * 4096 * 32
    total = flops.step(images=0, positions=1000, pairs=1000**2, targets=1000)
    assert total == pytest.approx(6 * 6.6e9 * 1000 + 12 * 32 * 4096 * 1000**2, rel=0.01)


def test_a_frozen_llm_has_no_gradients_of_weights():
    full, frozen = (training_flops(load_config(["llm=phi2", f"recipe.lm={lm}"])) for lm in ("full", "frozen"))
    assert frozen.position == full.position * 2 / 3 and frozen.pair == full.pair and frozen.tower == full.tower


def test_the_tower_by_hand():
    """SigLIP SO400M at 384 px: 26 blocks up to the tap, width 1152, MLP 4304, 27 x 27 patches of 14 x 14 x 3."""
    block = 2 * 729 * (4 * 1152**2 + 2 * 1152 * 4304) + 2 * 2 * 729**2 * 1152
    assert training_flops(load_config(["backbone=siglip_so400m_384"])).tower == 26 * block + 2 * 729 * 588 * 1152


def test_the_tower_of_clip_by_hand():
    """CLIP ViT-L at 336 px: 23 blocks up to the tap, width 1024, 576 patches of 14 x 14 x 3 and the class token."""
    block = 2 * 577 * (4 * 1024**2 + 2 * 1024 * 4096) + 2 * 2 * 577**2 * 1024
    assert training_flops(load_config(["backbone=clip_vit_l_336"])).tower == 23 * block + 2 * 576 * 588 * 1024


def test_attention_whose_heads_differ_by_layer():
    sizes = {"model_type": "gemma4_text", "num_hidden_layers": 4, "head_dim": 32, "global_head_dim": 48}
    sizes |= {"hidden_size_per_layer_input": 0, "layer_types": ["sliding_attention", "full_attention"] * 2}
    config = load_config(["llm=mini_qwen2", "llm.pretrained=false", f"llm.architecture={sizes}".replace("'", "")])
    assert training_flops(config).pair == 3 * 2 * 2 * 4 * 2 * (32 + 48)


def test_an_llm_without_attention_has_no_pairs(tmp_path):
    content = {key: value for key, value in load_choice("llm", "mini_qwen2").items() if key != "name"}
    sizes = {"model_type": "mamba", "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 512}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content | {"architecture": sizes, "attention": "eager"}))
    assert training_flops(load_config([f"llm={tmp_path}/own.yaml"])).pair == 0
