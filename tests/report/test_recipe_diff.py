"""How the report says that a cell was not trained as the authors trained theirs."""

import csv
import importlib.metadata

import pytest
from omegaconf import OmegaConf

from prism_deco.config import load_config
from prism_deco.report.assemble import write_report
from prism_deco.report.cells import RunCell
from prism_deco.report.collect import collect
from prism_deco.report.recipe_diff import departures
from prism_deco.sweep.expand import expand
from prism_deco.sweep.spec import parse

MIX = "data=llava_v1_5_mix665k"
DECO = ("recipe=deco", MIX, "trainer=fsdp", "trainer.reduce_dtype=bfloat16", "llm=phi2", "backbone=clip_vit_l_336")
FINETUNE = ("recipe=llava_v1_5_finetune", MIX, "trainer=fsdp", "backbone=clip_vit_l_336", "llm=vicuna_7b_v1_5")
FINETUNE += ("llm.dtype=bfloat16", "recipe.start_from=runs/x-align")
THEIR = {"torch": "2.1.0+cu121", "transformers": "4.39.1", "open_clip_torch": "2.23.0", "timm": "0.9.10"}
LLAVA = {"transformers": "4.37.2"}


def found(overrides, folder, table=3, **manifest) -> dict[str, tuple[str, str]]:
    """Of a run with these settings, by setting; from its file, which is read without the schema."""
    config = load_config(overrides)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    stored = OmegaConf.load(folder / "config.yaml")
    cell = RunCell("x", folder, {"projector": str(config.projector.name)}, "done", config=stored, manifest=manifest)
    return {setting: (ours, authors) for setting, ours, authors in departures(cell, table)}


@pytest.mark.parametrize("projector", ["avgpool", "c_abstractor"])
@pytest.mark.parametrize(("llm", "passes"), [("phi2", 2), ("qwen1_5_0_5b_chat", 2), ("vicuna_7b_v1_5", 1)])
def test_a_cell_that_ran_as_the_authors_departs_in_nothing(tmp_path, llm, passes, projector):
    overrides = [*DECO, f"llm={llm}", f"projector={projector}"]
    assert load_config(overrides).recipe.micro_batch_size == passes
    assert found(overrides, tmp_path, devices=2, packages=THEIR) == {}


def test_prismatics_recipe_departs_in_all_that_decides_the_numbers(tmp_path):
    """The list of the fact sheet: prompts and image slot, resize, lengths, passes, start, libraries."""
    ours = dict.fromkeys(THEIR, "9.9")
    overrides = [*DECO, "recipe=prism", "projector=c_abstractor"]
    assert found(overrides, tmp_path, devices=8, packages=ours) == {
        "recipe": ("prism", "deco"),
        "recipe.prompt_set": ("null", "deco"),
        "recipe.image_slot": ("after_bos", "after_first_token"),
        "recipe.resize": ("letterbox", "resize-naive"),
        "recipe.projector_init": ("normal", "torch"),
        "recipe.max_text_tokens": ("2048", "1024"),
        "records per forward pass x devices": ("16 x 8", "2 x 2"),
        "torch": ("9.9", "2.1.0"),
        "transformers": ("9.9", "4.39.1"),
        "open_clip_torch": ("9.9", "2.23.0"),
        "timm": ("9.9", "0.9.10"),
    }


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["recipe.packing=true", "recipe.max_logits=null", "recipe.num_tokens=64", "llm.attention=eager"], {}),
        (["backbone.resize=letterbox"], {"backbone.resize": ("letterbox", "resize-naive")}),
        (["recipe.resize=letterbox"], {"recipe.resize": ("letterbox", "resize-naive")}),
        (["backbone.layer=-1"], {"backbone.layer": ("-1", "-2")}),
        (["projector.mlp_depth=3"], {"projector.mlp_depth": ("3", "2")}),
        (["llm.architecture.resid_pdrop=0.0"], {"llm.architecture.resid_pdrop": ("0.0", "0.1")}),
        (["llm.chat_template='{{ messages }}'"], {"llm.chat_template": ('"{{ messages }}"', "another")}),
        (["recipe.betas=[0.9,0.98]"], {"recipe.betas": ("[0.9, 0.98]", "[0.9, 0.999]")}),
        (["recipe.start_from=/elsewhere/runs/x"], {"recipe.start_from": ("x", "null")}),
        (["data.limit=100"], {"data.limit": ("100", "null")}),
        (["seed=8"], {"seed": ("8", "7")}),
        (["trainer.precision=32-true"], {"trainer.precision": ("32-true", "bf16-mixed")}),
        (["trainer.reduce_dtype=float32"], {"trainer.reduce_dtype": ("float32", "bfloat16")}),
        (["trainer=ddp"], {}),  # nothing is reduced in another type than it is computed in
        (["recipe.micro_batch_size=4"], {"records per forward pass x devices": ("4 x 2", "2 x 2")}),
    ],
)
def test_departures_from_the_grid(tmp_path, more, expected):
    assert found([*DECO, *more], tmp_path, devices=2, packages=THEIR) == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ([], {}),
        (["recipe.lr=2e-5"], {"recipe.lr": ("2e-5", "2e-4")}),
        (
            ["recipe.lm=full", "recipe.projector_lr=null", "recipe.weight_decay=0.1", "seed=8"],
            {
                "recipe.lm": ("full", "lora"),
                "recipe.projector_lr": ("null", "2e-5"),
                "recipe.weight_decay": ("0.1", "0.0"),
            },
        ),
        (["recipe.start_from=null"], {"recipe.start_from": ("null", "a run of the stage align")}),
        (["projector=qformer"], {"projector.weights": ("null", "BLIP-2's, or null with heads=64")}),
        (["projector=qformer", "projector.weights=blip2.pth"], {}),
    ],
)
def test_departures_from_table_1(tmp_path, more, expected):
    assert found([*FINETUNE, *more], tmp_path, table=1, devices=8, packages=LLAVA) == expected


def test_keys_that_an_earlier_version_lacked_are_no_difference(tmp_path):
    content = OmegaConf.to_container(load_config(FINETUNE), resolve=True)
    for key in ("tokenize", "lora_r", "projector_seed"):
        del content["recipe"][key]
    content["recipe"]["removed_since"] = 1
    cell = RunCell("x", tmp_path, {}, "done", config=OmegaConf.create(content), manifest={"devices": 8})
    assert [departure.setting for departure in departures(cell, 1)] == ["transformers"]


def test_the_sweep_runs_as_the_authors_unless_it_is_told_otherwise(tmp_path):
    """Twelve cells, two tables: the libraries are younger, and nothing else is different."""
    here = {name: importlib.metadata.version(name).partition("+")[0] for name in THEIR}
    for more, expected in (([], set()), (["recipe=prism"], {"recipe", "recipe.resize", "recipe.prompt_set"})):
        cells = expand(parse(["generalization", *more]))
        assert len(cells) == 12
        for cell in cells:
            own = RunCell(cell.id, tmp_path, {"projector": cell.labels["projector"]}, "planned", config=cell.config)
            listed = {departure.setting: departure.ours for departure in departures(own, 3)}
            assert here.items() <= listed.items()
            assert expected <= listed.keys() if more else listed.keys() == here.keys()


def test_the_report_lists_them_beside_the_table(make, tmp_path):
    tokens = {"visual_in": 576, "visual_out": 144}
    for name, *more in (("a",), ("b", "projector=c_abstractor"), ("c", "recipe=prism")):
        about = {"devices": 2, "packages": THEIR, "tokens": tokens, "steps": 200}
        make.run(tmp_path / "s" / name, *DECO, *more, benchmarks=("gqa",), **about)
    cells = collect([tmp_path / "s"])
    assert [[departure.setting for departure in departures(cell, 3)] for cell in cells[:2]] == [[], []]
    page, _ = write_report([tmp_path / "s"], tmp_path / "out", mixed=True)
    text = page.with_suffix(".md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| recipe")]
    assert "| recipe | prism | deco | c |" in lines and "| recipe.max_text_tokens | 2048 | 1024 | c |" in lines
    assert "Compared with recipe=deco" in text and "Recipe: deco (2 cells), prism (1 cell)." in text
    rows = list(csv.DictReader((tmp_path / "out/settings.csv").read_text().splitlines()))
    assert {row["cell"] for row in rows} == {"c"}
    assert {"cell": "c", "setting": "recipe.resize", "ours": "letterbox", "authors": "resize-naive"} in rows
