"""The LLaVA-1.5 recipe as the paper's Table 4 and LLaVA's scripts have it, and the sweeps that use it."""

from dataclasses import fields

import pytest
from omegaconf import OmegaConf

from prism_deco.build import group, prompt_options
from prism_deco.config import choices, load_config
from prism_deco.config.choices import choice_path
from prism_deco.config.schema import RecipeConfig
from prism_deco.evaluation import resolve
from prism_deco.llms import build_llm
from prism_deco.report import paper
from prism_deco.stages import split
from prism_deco.sweep.expand import expand
from prism_deco.sweep.spec import parse

COMMAND = ["recipe=llava_v1_5", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5"]


@pytest.fixture(scope="module")
def stages():
    return {stage.name: stage.config for stage in split(COMMAND)}


@pytest.mark.parametrize(
    ("key", "align", "finetune"),
    [
        # Table 4 of the paper.
        ("recipe.global_batch_size", 256, 128),
        ("recipe.lr", 1e-3, 2e-4),  # the table has 2e-5 for the second stage; the test below
        ("recipe.warmup_ratio", 0.03, 0.03),
        ("recipe.weight_decay", 0.0, 0.0),
        ("recipe.epochs", 1, 1),
        ("recipe.lm", "frozen", "lora"),
        # LLaVA's scripts.
        ("recipe.micro_batch_size", 32, 16),
        ("recipe.projector_lr", None, 2e-5),
        ("recipe.warmup_rounding", "up", "up"),
        ("recipe.update_idle_projector", True, True),
        ("recipe.long_questions", "cut", "cut"),
        ("recipe.projector_seed", "run", "run"),
        ("recipe.prompt", "plain", "chat"),
        ("recipe.image_slot", "after_bos", "in_place"),
        ("recipe.tokenize", "whole", "whole"),
        ("backbone.resize", "resize-crop", "pad"),
        ("backbone.layer", -2, -2),
        ("recipe.sampler", "shuffled", "llava"),
        ("recipe.max_positions", 2048, 2048),
        ("recipe.lora_r", 128, 128),
        ("recipe.lora_alpha", 256, 256),
        ("recipe.lora_dropout", 0.05, 0.05),
        ("data.name", "llava_pretrain_558k", "llava_v1_5_mix665k"),
        ("data.val_fraction", 0.0, 0.0),
        ("projector.num_tokens", 144, 144),
    ],
)
def test_the_stages_hold_the_published_values(stages, key, align, finetune):
    group, _, name = key.partition(".")
    assert (stages["align"][group][name], stages["finetune"][group][name]) == (align, finetune)


def test_both_readings_of_the_learning_rate_are_at_hand():
    config = split([*COMMAND, "finetune.recipe.lr=2e-5"])
    assert [stage.config.recipe.lr for stage in config] == [1e-3, 2e-5]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        # Table 5 of the paper.
        ("recipe.global_batch_size", 128),
        ("recipe.lr", 2e-5),
        ("recipe.weight_decay", 0.1),
        ("recipe.grad_clip", 1.0),
        ("recipe.warmup_ratio", 0.03),
        ("recipe.epochs", 1),
        ("recipe.lm", "full"),
        # prismatic-vlms.
        ("recipe.image_slot", "after_bos"),
        ("recipe.sampler", "prismatic"),
        ("recipe.warmup_rounding", "down"),
        ("recipe.update_idle_projector", False),
        ("recipe.long_questions", "cut"),
        ("recipe.projector_seed", "tower_width"),
        ("recipe.loss", "micro_batch_mean"),
        ("backbone.resize", "letterbox"),
        ("backbone.layer", -2),
        ("projector.num_tokens", 144),
    ],
)
def test_the_single_stage_holds_the_published_values(key, value):
    group, _, name = key.partition(".")
    assert load_config(["recipe=prism", "backbone=clip_vit_l_336", "llm=phi2"])[group][name] == value


@pytest.mark.parametrize(
    ("recipe", "rows"), [("llava_v1_5_align", 32000), ("llava_v1_5_finetune", 32000), ("prism", 32064)]
)
def test_prism_adds_a_padding_token_and_llava_none(recipe, rows):
    config = load_config([f"recipe={recipe}", *COMMAND[1:]])
    llm = build_llm(group(config, "llm"), device="meta", **prompt_options(config))
    assert llm.embedding_rows == rows


@pytest.mark.parametrize("recipe", ["prism", "deco", "llava_v1_5_align", "llava_v1_5_finetune"])
def test_a_strict_recipe_states_every_value_that_it_relies_on(recipe):
    """A default of the schema may change, and with it a recipe that is silent; keys that change no number may be."""
    stated = set(OmegaConf.load(choice_path("recipe", recipe)))
    silent = {field.name for field in fields(RecipeConfig)} - stated
    own = {"name", "stages", "start_from"}
    computed_alike = {"packing", "max_logits"} | ({"tower_lr", "tower_layers"} if "tower" in stated else set())
    adapters = {key for key in silent if key.startswith("lora_")} if recipe != "llava_v1_5_finetune" else set()
    assert silent <= own | computed_alike | adapters


@pytest.mark.parametrize(
    ("recipe", "differing"),
    [
        ("prism", {}),
        ("llava_v1_5_align", {"added_tokens": False, "prompt": "plain", "tokenize": "whole", "max_positions": 2048}),
        ("llava_v1_5_finetune", {"added_tokens": False, "tokenize": "whole", "max_positions": 2048}),
    ],
)
def test_what_the_strict_recipes_were_once_silent_about(recipe, differing):
    silent = {
        "prompt": "chat", "tokenize": None, "added_tokens": True, "standardise_features": False, "token_scale": None,
        "turn_mask": "causal", "blind": False, "max_steps": None, "max_positions": None, "betas": (0.9, 0.999),
        "eps": 1e-8, "packing": False,
    }  # fmt: skip
    composed = load_config([f"recipe={recipe}"]).recipe
    assert {key: composed[key] for key in silent} == silent | differing


def test_prism_and_the_miniature_stay_as_they_were():
    for recipe in ("prism", "mini"):
        config = load_config([f"recipe={recipe}"])
        assert (config.recipe.lm, config.recipe.prompt, config.backbone.resize) == ("full", "chat", "letterbox")
        assert (config.recipe.start_from, config.recipe.tokenize, config.recipe.max_positions) == (None, None, None)
    assert load_config(["recipe=prism", "backbone.resize=resize-naive"]).backbone.resize == "resize-naive"


SWEEPS = {
    "projectors": ("projector", ["linear", "qformer", "c_abstractor", "d_abstractor", "avgpool"]),
    "compression": ("recipe.num_tokens", [576, 256, 144, 64, 36, 16]),
    "pooling": ("projector", ["avgpool", "maxpool"]),
    "convergence": ("projector", ["linear", "qformer", "c_abstractor", "d_abstractor", "avgpool"]),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_the_sweeps_of_the_paper(name):
    axis, values = SWEEPS[name]
    cells = expand(parse([name]))
    assert [cell.labels for cell in cells] == [{axis: value} for value in values]
    for cell in cells:
        assert cell.config.backbone.name == "clip_vit_l_336" and cell.config.llm.name == "vicuna_7b_v1_5"
        assert cell.config.recipe.added_tokens is False and cell.config.llm.dtype == "bfloat16"
    last = {"convergence": "llava_v1_5_align"}.get(name, "llava_v1_5_finetune")
    assert {cell.config.recipe.name for cell in cells} == {last}


def test_table_1s_sweep_asks_for_table_2s_tasks_as_well():
    [names] = {tuple(resolve(cell.config.evaluate.benchmarks)) for cell in expand(parse(["projectors"]))}
    assert set(names) == {*paper.COLUMNS[1], *(benchmark for benchmark, _, _ in paper.SPATIAL)}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_sweep_has_a_miniature_twin_that_needs_nothing(name):
    axis, values = SWEEPS[name]
    cells = expand(parse([f"mini_{name}"]))
    assert [list(cell.labels) for cell in cells] == [[axis]] * len(cells)
    if axis == "projector":
        assert [cell.labels[axis] for cell in cells] == values
    for cell in cells:
        assert all(part.weights.startswith("asset:") for part in (cell.config.llm, cell.config.backbone))
    names = [stage.config.data.name for stage in split(cells[0].overrides)] or [cells[0].config.data.name]
    assert names in (["shapes_captions"], ["shapes_captions", "shapes"])


def test_all_sweeps_are_here():
    assert {*SWEEPS, *(f"mini_{name}" for name in SWEEPS)} <= set(choices("sweep"))
