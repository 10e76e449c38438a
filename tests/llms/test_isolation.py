"""Models whose layers carry something from record to record are not trained on packed rows or with a block mask."""

import time

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from prism_deco.cli import main
from prism_deco.config import choices, load_choice
from prism_deco.llms import build_llm
from prism_deco.llms.isolation import check_isolation

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
APART = {
    "qwen2": {},
    "llama": {},
    "phi": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
}
MIXED = {
    "mistral": {"sliding_window": 16},
    "gemma3_text": {"sliding_window": 16, "num_hidden_layers": 8},
    "olmo3": {"sliding_window": 16},
    "lfm2": {"block_ff_dim": 128, "layer_types": ["conv", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3], **MAMBA},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 3, "num_experts": 2, "use_mamba_kernels": False},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 128, "attention_chunk_size": 16},
    "recurrent_gemma": {"lru_width": 64, "block_types": ["recurrent", "recurrent", "attention"]},
}


def lm_of(family: str, **sizes) -> torch.nn.Module:
    config = AutoConfig.for_model(family, **(SIZES | sizes))
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def check(lm, way_out: str, longest: int = 512) -> None:
    packing = "packing" in way_out
    check_isolation(lm, packing=packing, turn_mask="causal" if packing else "block", longest=longest)


@pytest.mark.parametrize("way_out", ["recipe.packing=false", "recipe.turn_mask=causal"])
@pytest.mark.parametrize("family", [*APART, *MIXED])
def test_plain_causal_attention_passes_and_everything_else_is_refused(family, way_out):
    lm = lm_of(family, **(APART | MIXED)[family])
    if family in APART:
        check(lm, way_out)
    else:
        with pytest.raises(ValueError, match=f"{type(lm).__name__} does not compute .* independently.*Set {way_out}"):
            check(lm, way_out)


@pytest.mark.parametrize("way_out", ["recipe.packing=false", "recipe.turn_mask=causal"])
def test_a_window_that_no_record_exceeds_is_none(way_out):
    lm = lm_of("mistral", sliding_window=64)
    check(lm, way_out, longest=64)
    with pytest.raises(ValueError, match="MistralForCausalLM"):
        check(lm, way_out, longest=65)


@pytest.mark.parametrize("choice", choices("llm"))
def test_the_shipped_models_pass_at_their_own_width_without_weights(choice):
    """Also those of billions of parameters, of which one layer is computed."""
    lm = build_llm(choice, pretrained=False, device="meta").model
    started = time.monotonic()
    check_isolation(lm, packing=True, turn_mask="block", longest=2048)
    assert time.monotonic() - started < 60
    assert all(parameter.is_meta for parameter in lm.parameters())


def test_nothing_but_the_kind_of_attention_changes():
    lm = lm_of("qwen2")
    before, state = torch.get_rng_state(), {name: p.clone() for name, p in lm.named_parameters()}
    check_isolation(lm, packing=False, turn_mask="causal", longest=512)
    assert lm.config._attn_implementation == "sdpa"
    check_isolation(lm, packing=True, turn_mask="block", longest=512)
    assert lm.config._attn_implementation == "packed_sdpa" and len(lm.model.layers) == 4
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(state[name], p) for name, p in lm.named_parameters())


def test_other_attention_and_lost_segments_are_refused_before_the_first_step():
    with pytest.raises(ValueError, match="packing=true needs llm.attention=sdpa, not eager"):
        check(AutoModelForCausalLM.from_config(lm_of("llama").config, attn_implementation="eager"), "packing")
    with pytest.raises(ValueError, match="does not pass on `segments`"):
        check(lm_of("stablelm"), "packing")


@pytest.mark.parametrize("override", ["recipe.packing=true", "recipe.turn_mask=block"])
def test_a_run_is_refused_when_it_starts(colors, tmp_path, capsys, override):
    content = load_choice("llm", "mini_qwen2")
    hybrid = SIZES | MIXED["lfm2"] | {"model_type": "lfm2", "vocab_size": 576}
    content = {key: value for key, value in content.items() if key != "name"} | {"architecture": hybrid}
    (tmp_path / "hybrid.yaml").write_text(yaml.safe_dump(content))
    command = f"""train llm={tmp_path}/hybrid.yaml data=llava data.json={colors}/train.json
        data.image_root={colors}/images data.val_fraction=0 data.num_workers=0 evaluate.benchmarks=null
        recipe.turn_mask=causal recipe.max_steps=1 recipe.micro_batch_size=4 recipe.global_batch_size=4
        backbone.pretrained=false llm.pretrained=false trainer.samples=0 runs_dir={tmp_path} run_id=run"""
    for flags in (["--check"], []):
        assert main([*command.split(), override, *flags]) == 2
        shown = " ".join(capsys.readouterr().err.split())
        assert "Lfm2ForCausalLM" in shown and f"Set {override.split('=')[0]}=" in shown
    assert not (tmp_path / "run").exists()
    assert main([*command.split(), "run_id=padded"]) == 0, "padded and causal, it can be trained"
