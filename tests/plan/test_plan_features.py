"""What a cache of features saves, by hand, and what `auto` makes of it."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from prism_deco.config import load_config
from prism_deco.features import Layout
from prism_deco.plan import as_json, plan_run, table
from prism_deco.plan.features import CachePlan
from prism_deco.sharing import mode, sharing

CELL = ["recipe=prism", "trainer=fsdp", "data=llava_v1_5_mix665k", "backbone=dinov2_siglip_384"]


def _plan(**changes):
    """A thousand images shown twice; towers are half of the work; reading takes a tenth of a tower."""
    plan = CachePlan(images=1000, bytes=1, visits=2000, tower=10**9, read=10**8, flops=4e12, seconds=1e-9, sharing="")
    return replace(plan, **changes)


def test_savings_by_hand():
    plan = _plan()
    assert plan.tower_share == 0.5
    # 2000 times a tower less a reading; and 1000 images computed and written.
    assert plan.saved() == 2000 * 0.9e9 - 1000 * 1.1e9
    assert plan.saved(runs=4) == 2000 * 0.9e9 - 250 * 1.1e9
    assert plan.saved(to_build=0) == 2000 * 0.9e9
    assert plan.ratio(runs=4) == 1 - 1.525e12 / 4e12
    assert plan.hours(runs=4) == pytest.approx(1.525e12 * 1e-9 / 3600)
    assert _plan(seconds=None).hours() is None
    # An accelerator of 4e14 operations per second does 4e8 of them while a kilobyte comes at a gigabyte per second.
    layout = Layout(10, 1, 250, torch.float32)
    made = CachePlan.of([layout, layout], visits=1.0, tower=1, flops=1.0, speed=4e14, devices=8)
    assert (made.images, made.bytes, made.read) == (20, 2 * layout.bytes, 4e8)
    assert made.seconds == pytest.approx(1 / 4e14 / 8)


@pytest.mark.parametrize(
    ("changes", "runs", "to_build", "pays"),
    [
        ({}, 1, None, False),  # each image is shown twice only
        ({}, 2, None, True),  # four times, by two runs
        ({"visits": 3000}, 1, None, True),
        ({}, 1, 666, True),  # a third is to be built
        ({}, 1, 667, False),
        ({}, 1, 0, True),
        ({"flops": 40e12}, 1, 0, False),  # towers are a twentieth: too little to notice
        ({"read": 10**9}, 1, 0, False),  # reading takes as long as computing
        ({"images": 10, "visits": 100, "flops": 1e11}, 1, 0, False),  # over in seconds either way
    ],
)
def test_what_auto_does(changes, runs, to_build, pays):
    assert _plan(**changes).pays(runs, to_build) == pays


@pytest.mark.slow
def test_the_shares_of_the_paper_s_cells():
    """At 200 tokens of text, by two operations per parameter and patch or position."""
    expected = {("dinov2_siglip_384", "qwen1_5_0_5b_chat"): 0.51, ("dinov2_siglip_384", "phi2"): 0.15}
    expected[("siglip_so400m_224", "phi2")] = 0.03
    for (backbone, llm), share in expected.items():
        settings = [*CELL, f"backbone={backbone}", f"llm={llm}", "projector=avgpool"]
        cache = plan_run(load_config(settings)).needs.cache
        assert cache.tower_share == pytest.approx(share, abs=0.08)
        assert cache.visits == pytest.approx(624_610, rel=1e-3) and cache.images == 624_610


def test_runs_that_share():
    def name(*overrides):
        config = load_config([*CELL, "llm=phi2", "projector=avgpool", *overrides])
        return sharing(config)

    same = [
        "llm=vicuna_7b_v1_5",
        "seed=8",
        "recipe.epochs=3",
        "recipe.lr=1e-3",
        "data.num_workers=1",
        "trainer.devices=2",
    ]
    assert {name(change) for change in same} == {name()}
    other = [
        "projector=maxpool",
        "recipe.num_tokens=64",
        "backbone.layer=-1",
        "data.limit=10",
        "trainer.precision=32-true",
    ]
    assert len({name(change) for change in other} | {name()}) == len(other) + 1
    assert len({name(f"projector={projector}") for projector in ("avgpool", "c_abstractor", "qformer")}) == 3
    assert name("backbone.pretrained=false") != name("backbone.pretrained=false", "seed=8")


def test_the_table_says_what_a_sweep_saves():
    plans = [
        plan_run(load_config([*CELL, f"llm={llm}", "projector=avgpool"]), llm) for llm in ("phi2", "qwen1_5_0_5b_chat")
    ]
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table(plans, 0.4))
    text = " ".join(console.export_text().split())
    first, second = (plan.needs.cache for plan in plans)
    saved = (first.saved(2) + second.saved(2)) / (first.flops + second.flops)
    verb = "saves" if saved > 0 else "costs"
    assert (
        f"Features, phi2, qwen1_5_0_5b_chat: the towers are {first.tower_share:.0%} to {second.tower_share:.0%}" in text
    )
    assert f"one cache of 365 GiB {verb} {abs(saved):.0%}" in text
    content = json.loads(json.dumps(as_json(plans)))
    assert [plan["needs"]["cache"]["runs"] for plan in content] == [2, 2]
    assert content[1]["needs"]["cache"]["ratio"] == second.ratio(2)


def test_distinct_images_are_counted_where_the_files_are(colors):
    settings = ["data=llava", f"data.json={colors}/train.json", f"data.image_root={colors}/images"]
    for limit, count in ((None, 8), (3, 3)):
        needs = plan_run(load_config([*settings, f"data.limit={limit or 'null'}", "data.val_fraction=0"])).needs
        assert needs.cache.images == count
        assert needs.cache.bytes == Layout(count, 16, 96, torch.float32).bytes


@pytest.mark.parametrize(("text", "expected"), [("off", "off"), ("on", "on"), ("auto", "auto"), ("'off'", "off")])
def test_yaml_s_truth_values(text, expected):
    assert mode(load_config([f"trainer.feature_cache={text}"])) == expected


def test_wrong_settings():
    with pytest.raises(ValueError, match="Choices: auto, off, on"):
        mode(load_config(["trainer.feature_cache=of"]))
    with pytest.raises(ValueError, match="feature_cache_runs=0"):
        mode(load_config(["trainer.feature_cache_runs=0"]))
