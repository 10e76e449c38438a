"""Models whose layers carry something from record to record are not trained on packed rows or with a block mask, and
models that do not compute a record from its embeddings alone not at all."""

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from prism_deco.cli import main
from prism_deco.config import choices, load_choice
from prism_deco.errors import UsageError
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


def check(lm, hint: str, longest: int = 512) -> None:
    packing = "packing" in hint
    check_isolation(lm, packing=packing, turn_mask="causal" if packing else "block", longest=longest)


@pytest.mark.parametrize("hint", ["recipe.packing=false", "recipe.turn_mask=causal"])
@pytest.mark.parametrize("family", [*APART, *MIXED])
def test_plain_causal_attention_passes_and_everything_else_is_refused(family, hint):
    lm = lm_of(family, **(APART | MIXED)[family])
    if family in APART:
        check(lm, hint)
    else:
        with pytest.raises(ValueError, match=f"{type(lm).__name__} does not compute .* independently.*Set {hint}"):
            check(lm, hint)


@pytest.mark.parametrize("hint", ["recipe.packing=false", "recipe.turn_mask=causal"])
def test_a_window_that_no_record_exceeds_is_none(hint):
    lm = lm_of("mistral", sliding_window=64)
    check(lm, hint, longest=64)
    with pytest.raises(ValueError, match="MistralForCausalLM"):
        check(lm, hint, longest=65)


def _narrowest() -> dict[str, str]:
    """The shipped LLM of the smallest width, by architecture."""
    shipped = [load_choice("llm", name)["architecture"] | {"choice": name} for name in choices("llm")]
    by_width = sorted(shipped, key=lambda each: -each["hidden_size"])
    return {each["model_type"]: each["choice"] for each in by_width if not each["choice"].startswith("mini_")}


@pytest.mark.parametrize("choice", [*_narrowest().values(), "vicuna_7b_v1_5"])
def test_the_shipped_models_pass_at_their_own_width_without_weights(choice):
    """Also those of billions of parameters, of which one layer is computed."""
    lm = build_llm(choice, pretrained=False, device="meta").model
    is_plain = "gemma3" not in choice  # a window of 512 positions
    check_isolation(lm, packing=is_plain, turn_mask="block" if is_plain else "causal", longest=2048)
    assert all(parameter.is_meta for parameter in lm.parameters())


LAYERS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 0}
PER_LAYER = LAYERS | {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 16}
UNFIT = {
    # Embeddings of their own for every layer; the second looks ids up by the embeddings, which visual tokens defeat.
    "gemma3n_text": (
        PER_LAYER | {"activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [128] * 4},
        "uses token ids for more than their embeddings, and images have no token ids",
    ),
    "gemma4_text": (PER_LAYER, "cannot be used with images: .*`input_ids`"),
    "bamba": (MIXED["bamba"], r"cannot be used with images: You passed `inputs_embeds` to `\.generate\(\)`"),
}


@pytest.mark.parametrize("family", UNFIT)
def test_models_that_embeddings_do_not_suffice_for_are_refused(family):
    sizes, reason = UNFIT[family]
    lm = lm_of(family, **sizes)
    with pytest.raises(UsageError, match=f"{type(lm).__name__} {reason}.*Choose another llm"):
        check_isolation(lm, packing=False, turn_mask="causal", longest=512)


@pytest.mark.parametrize("family", ["gemma3_text", "lfm2", "mistral", "qwen2"])
def test_windows_and_convolutions_can_be_padded_and_cached(family):
    sizes = (APART | MIXED)[family]
    check_isolation(lm_of(family, **sizes), packing=False, turn_mask="causal", longest=512)


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda hidden, options: hidden + hidden.mean(dim=(0, 1)), "padded on the right"),
        (lambda hidden, options: hidden + hidden[:, :1].cumsum(0), "padded on the right"),
        (lambda hidden, options: hidden + hidden[:, :1] * options.get("use_cache", False), "with a cache"),
    ],
)
def test_a_model_that_mixes_records_is_refused(monkeypatch, break_it, reason):
    """A real model whose hidden states take in those of other records, or depend on the cache."""
    lm = lm_of("llama")
    forward = type(lm.model).forward

    def broken(self, *args, **options):
        output = forward(self, *args, **options)
        output.last_hidden_state = break_it(output.last_hidden_state, options)
        return output

    monkeypatch.setattr(type(lm.model), "forward", broken)
    with pytest.raises(UsageError, match=f"LlamaForCausalLM .*{reason}.*differ by"):
        check_isolation(lm, packing=False, turn_mask="causal", longest=512)


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


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mamba", "mamba2", "gpt_neo"])
def test_an_architecture_without_sdpa_is_tried_by_its_own_attention(family):
    own = {
        "gemma2": {"head_dim": 16},
        "gpt_oss": {"head_dim": 16, "num_local_experts": 4},
        "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 8},
        "gpt_neo": {"num_hidden_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    }
    config = AutoConfig.for_model(family, **(SIZES | own.get(family, {})))
    lm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    check_isolation(lm, packing=False, turn_mask="causal", longest=512)
    with pytest.raises(UsageError, match="Set recipe.turn_mask=causal"):
        check_isolation(lm, packing=False, turn_mask="block", longest=512)


def test_eager_attention_which_adds_a_mask_is_not_taken_for_one_that_applies_it():
    """It would add the block mask's True and False to the scores as 1 and 0."""
    lm = AutoModelForCausalLM.from_config(lm_of("llama").config, attn_implementation="eager")
    check_isolation(lm, packing=False, turn_mask="causal", longest=512)
    with pytest.raises(UsageError, match="rounds of one row independently.*Set recipe.turn_mask=causal"):
        check_isolation(lm, packing=False, turn_mask="block", longest=512)


def test_token_ids_that_must_be_numbers():
    lm = lm_of("modernbert-decoder", pad_token_id=0)
    check_isolation(lm, packing=False, turn_mask="causal", longest=512)
    with pytest.raises(UsageError, match="Set recipe.packing=false"):
        check_isolation(lm, packing=True, turn_mask="causal", longest=512)


def test_no_layers_are_refused():
    lm = lm_of("llama", num_hidden_layers=0)
    with pytest.raises(UsageError, match="LlamaForCausalLM has no list of 0 decoder layers"):
        check_isolation(lm, packing=False, turn_mask="causal", longest=512)


def longrope(long_factor: float) -> dict:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    rope |= {"short_factor": [1.0] * 8, "long_factor": [long_factor] * 8}
    return {"original_max_position_embeddings": 64, "rope_parameters": rope, "pad_token_id": 0}


@pytest.mark.parametrize("packing", [False, True])
def test_frequencies_that_the_longest_record_of_a_batch_chooses_are_refused(packing):
    lm = lm_of("phi3", **longrope(4.0))
    lengths = [80, 10]
    rows = torch.randn(2, max(lengths), 64)
    with torch.no_grad():
        together, alone = lm.model(inputs_embeds=rows)[0][1, :10], lm.model(inputs_embeds=rows[1:, :10])[0][0]
    assert (together - alone).abs().max() > 1e-3
    with pytest.raises(
        UsageError, match="Phi3ForCausalLM chooses its rotary frequencies .*Set recipe.max_positions=64"
    ):
        check_isolation(lm, packing=packing, turn_mask="causal", longest=65)
    check_isolation(lm_of("phi3", **longrope(4.0)), packing=packing, turn_mask="block", longest=64)
    check_isolation(lm_of("phi3", **longrope(1.0)), packing=packing, turn_mask="block", longest=512)


def test_frequencies_for_records_longer_than_any_of_the_run_are_no_matter(colors, tmp_path, capsys):
    """What counts is the longest record that the recipe allows, not the longest sequence that the LLM supports."""
    content = {key: value for key, value in load_choice("llm", "mini_qwen2").items() if key != "name"}
    command = f"""train --check llm={tmp_path}/own.yaml data=llava data.json={colors}/train.json
        data.image_root={colors}/images data.val_fraction=0 data.num_workers=0 evaluate.benchmarks=null
        recipe.turn_mask=causal recipe.micro_batch_size=4 recipe.global_batch_size=4 backbone.pretrained=false
        llm.pretrained=false trainer.samples=0 runs_dir={tmp_path} recipe.max_text_tokens=64"""
    for limit, code in ((32, 2), (1024, 0)):
        sizes = SIZES | longrope(4.0) | {"max_position_embeddings": 4096, "model_type": "phi3", "vocab_size": 576}
        sizes["rope_parameters"]["original_max_position_embeddings"] = limit
        sizes["original_max_position_embeddings"] = limit
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(content | {"architecture": sizes}))
        assert main(command.split()) == code, capsys.readouterr().err
