"""Prompt sets: what a recipe's name for one makes of the LLM and of the recipe, and what a run stores of it."""

import pytest
from omegaconf import OmegaConf

from prism_deco.build import group, prompt_options
from prism_deco.cli import main
from prism_deco.config import changed_from_defaults, load_choice, load_config, read_config, save_config, value_origins
from prism_deco.errors import UsageError
from prism_deco.llms import build_llm

SET = """\
pretrained: false
tokenizer: asset:phi
architecture: {model_type: phi, vocab_size: 576, hidden_size: 16}
special_tokens: {bos_token: <|endoftext|>, eos_token: <|endoftext|>, pad_token: <|endoftext|>}
chat_template: own
prompt_sets:
  short: {chat_template: other, recipe: {max_text_tokens: 32}}
"""


def plain(config):
    return OmegaConf.to_container(config, resolve=True)


def stored(folder, *overrides):
    folder.mkdir(exist_ok=True)
    config = load_config([*overrides, "run_id=x"])
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml", plain(config)


@pytest.mark.parametrize(
    ("llm", "length", "micro_batch"), [("phi2", 1024, 2), ("qwen1_5_0_5b_chat", 1024, 2), ("vicuna_7b_v1_5", 2048, 1)]
)
def test_the_authors_recipe(llm, length, micro_batch):
    config = load_config(["recipe=deco", f"llm={llm}", "projector=c_abstractor", "backbone=siglip_so400m_224"])
    recipe = config.recipe
    assert (recipe.max_text_tokens, recipe.micro_batch_size, recipe.global_batch_size) == (length, micro_batch, 128)
    assert (recipe.image_slot, recipe.loss, recipe.sampler) == ("after_first_token", "micro_batch_mean", "prismatic")
    assert (config.backbone.resize, config.projector.init, config.projector.num_tokens) == (
        "resize-naive",
        "torch",
        144,
    )
    assert (recipe.projector_seed, recipe.long_questions, recipe.update_idle_projector) == ("tower_width", "cut", False)
    assert load_config(["recipe=prism", f"llm={llm}", "projector=c_abstractor"]).projector.init == "normal"
    built = build_llm(group(config, "llm"), device="meta", **prompt_options(config))
    assert built.spec.asks is not None and built.prompt_format.image_slot == "after_first_token"
    assert "prompt_sets" not in config.llm


def test_without_a_set_an_llm_keeps_its_own_format():
    content = load_choice("llm", "phi2")
    own = load_config(["recipe=prism", "llm=phi2"]).llm
    assert own.chat_template == content["chat_template"] and "asks" not in own
    assert load_config(["recipe=deco", "recipe.prompt_set=null", "llm=phi2"]).llm == own
    assert load_config(["recipe=mini", "recipe.prompt_set=deco"]).llm.special_tokens == {
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip


def test_files_and_the_command_line_win_over_a_set(tmp_path):
    assert (
        load_config(["recipe=deco", "llm=vicuna_7b_v1_5", "recipe.max_text_tokens=512"]).recipe.max_text_tokens == 512
    )
    (tmp_path / "mine.yaml").write_text("recipe:\n  prompt_set: deco\n  max_text_tokens: 512\nllm: vicuna_7b_v1_5\n")
    config = load_config([str(tmp_path / "mine.yaml")])
    assert (config.recipe.prompt_set, config.recipe.max_text_tokens, config.recipe.micro_batch_size) == ("deco", 512, 1)


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=deco", "llm=vicuna_7b_v1_5"],
        ["recipe=deco", "llm=phi2", "recipe.max_text_tokens=99", "projector=c_abstractor"],
        ["recipe.prompt_set=deco", "llm=mini_phi"],
        ["recipe=deco", "recipe.prompt_set=null", "llm=qwen1_5_0_5b_chat"],
    ],
)
def test_a_run_stores_plain_values_that_compose_to_themselves(tmp_path, overrides):
    path, content = stored(tmp_path / "x", *overrides)
    assert "prompt_sets" not in path.read_text() and plain(read_config(path)) == content
    assert plain(load_config([str(path)])) == content
    assert not any(key.startswith("llm.") for key in changed_from_defaults(read_config(path)))


def test_another_choice_on_top_of_a_run_brings_its_own_set(tmp_path):
    path, _ = stored(tmp_path / "x", "recipe=deco", "llm=vicuna_7b_v1_5")
    other = load_config([str(path), "llm=phi2"])
    assert other.llm.special_tokens.pad_token == "<PAD>" and "bos_token" not in other.llm.special_tokens
    assert other.recipe.max_text_tokens == 1024
    assert "asks" not in load_config([str(path), "recipe=prism"]).llm


def test_runs_of_earlier_versions_have_no_set(tmp_path):
    path, content = stored(tmp_path / "x", "recipe=prism", "llm=phi2")
    del content["recipe"]["prompt_set"], content["recipe"]["projector_init"], content["evaluate"]["ask"]
    path.write_text(OmegaConf.to_yaml(content))
    assert read_config(path).recipe.prompt_set is None and changed_from_defaults(read_config(path)) == {"run_id": "x"}
    # One whose LLM offered a set that is gone.
    content["recipe"]["prompt_set"] = "gone"
    path.write_text(OmegaConf.to_yaml(content))
    assert changed_from_defaults(read_config(path))["recipe.prompt_set"] == "gone"


def test_an_llm_of_ones_own_offers_sets(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text(SET)
    config = load_config([f"llm={own}", "recipe.prompt_set=short"])
    assert (config.llm.chat_template, config.recipe.max_text_tokens) == ("other", 32)
    path, content = stored(tmp_path / "x", f"llm={own}", "recipe.prompt_set=short")
    own.unlink()
    assert plain(load_config([str(path)])) == content, "the stored values need no YAML"
    with pytest.raises(UsageError, match=r"own with recipe.prompt_set=short applied: name its YAML.* to use null"):
        load_config([str(path), "recipe.prompt_set=null"])


def test_an_llm_that_does_not_offer_the_set_is_refused():
    with pytest.raises(UsageError, match=r"llm=smollm2_135m_instruct has no prompt set 'deco'.*recipe.prompt_set=null"):
        load_config(["recipe=deco", "llm=smollm2_135m_instruct"])
    load_config(["recipe=deco", "llm=smollm2_135m_instruct", "recipe.prompt_set=null"])


def test_the_origin_of_a_value_names_the_set(capsys):
    origins = value_origins(["recipe=deco", "llm=vicuna_7b_v1_5", "recipe.micro_batch_size=4"])
    assert origins["recipe.max_text_tokens"] == "conf/llm/vicuna_7b_v1_5.yaml, prompt_sets.deco"
    assert origins["llm.asks.deco_no_header"] == "conf/llm/vicuna_7b_v1_5.yaml, prompt_sets.deco"
    assert origins["recipe.micro_batch_size"] == "command line"
    assert origins["llm.chat_template"] == "conf/llm/vicuna_7b_v1_5.yaml"
    assert value_origins(["recipe=deco", "llm=phi2"])["llm.chat_template"] == "conf/llm/phi2.yaml, prompt_sets.deco"
    assert main(["keys", "recipe"]) == 0 and "recipe.prompt_set" in capsys.readouterr().out
