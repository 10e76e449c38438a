"""The projector bench: parts of one table, and projectors of one's own in it."""

import json
from pathlib import Path

import pytest
import yaml

from prism_deco.cli import main
from prism_deco.config import choices
from prism_deco.evaluation.compressors import COMPRESSORS
from prism_deco.plan.meta_models import count, projector_of
from prism_deco.sweep import dry_run, expand, parse
from prism_deco.sweep.run import _asked

CONTROLS = {"every_kth", "random_patches", "bilinear", "small_image"}
NEIGHBOURS = {"avgpool_after_mlp", "avgpool_norm"}


def swept(cells):
    return {cell.labels["projector"] for cell in cells}


@pytest.mark.parametrize(("name", "numbers"), [("bench", (144, 64)), ("mini_bench", (16, 4))])
def test_the_bench_holds_every_projector_and_control_at_equal_numbers_of_tokens(name, numbers):
    cells = expand(parse([name]))
    assert swept(cells) == set(choices("projector")) | CONTROLS | NEIGHBOURS
    assert not any("part" in cell.labels for cell in cells)
    for cell in cells:
        projector, tokens = cell.labels["projector"], cell.labels.get("recipe.num_tokens")
        if projector == "linear":
            assert tokens is None
            assert set(cell.config.evaluate.compressors) == set(COMPRESSORS.names())
            assert tuple(cell.config.evaluate.num_tokens) == numbers
        elif projector == "small_image":
            assert cell.config.projector.name == "linear"
            patch = 14 if name == "bench" else 8
            assert (cell.config.backbone.image_size // patch) ** 2 == tokens
        elif projector == "matryoshka":
            assert (tokens, *cell.config.projector.coarser) == numbers
            assert tuple(cell.config.evaluate.num_tokens) == numbers[1:]
        else:
            assert cell.config.projector.num_tokens == tokens
    per_projector = {
        p: sorted(c.labels["recipe.num_tokens"] for c in cells if c.labels["projector"] == p) for p in CONTROLS
    }
    assert len({tuple(found) for found in per_projector.values()}) == 1


def test_the_table_of_its_parameters_is_published():
    page = (Path(__file__).parents[2] / "runs/reference/README.md").read_text(encoding="utf-8")
    found = {}
    for cell in expand(parse(["bench"])):
        where = cell.labels["backbone"], cell.labels.get("recipe.num_tokens")
        found.setdefault(cell.labels["projector"], {})[where] = count(projector_of(cell.config))
    assert found.pop("small_image") == {
        (backbone, tokens): found["linear"][backbone, None] for backbone, tokens in found["avgpool"]
    }
    for projector, numbers in found.items():
        row = []
        for backbone, tokens in found["avgpool"]:
            # Some are trained once: at all patches, or at the larger number of tokens.
            places = [(backbone, number) for number in (tokens, None, 144) if (backbone, number) in numbers]
            row.append(f"{numbers[places[0]]:,}")
        assert f"| `{projector}` | {' | '.join(row)} |\n" in page


def test_a_choice_of_projectors_narrows_axes_and_rows(tmp_path):
    cells = expand(parse(["mini_bench", "projector=avgpool,linear,small_image", "seed=1"]))
    assert [cell.id for cell in cells] == [
        *("avgpool-num_tokens16-seed1", "avgpool-num_tokens4-seed1", "linear-seed1"),
        *("small_image-16-seed1", "small_image-4-seed1"),
    ]
    cells = expand(parse(["mini_bench", "recipe.num_tokens=4", "projector=avgpool,matryoshka,small_image", "seed=1"]))
    ids = ["avgpool-num_tokens4-seed1", "matryoshka-num_tokens4-seed1", "small_image-4-seed1"]
    assert [cell.id for cell in cells] == ids
    # What a sweep records of itself is the same sweep.
    spec = parse(["mini_bench", "projector=avgpool,linear", "seed=1,2"])
    assert set(spec.controls) == CONTROLS == set(_asked(spec)["controls"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(_asked(spec), sort_keys=False))
    assert [c.id for c in expand(parse([str(tmp_path / "again.yaml")]))] == [c.id for c in expand(spec)]


@pytest.fixture
def own(tmp_path):
    """The YAML of a projector from outside the package; its module is imported where it trains."""
    (tmp_path / "bench_mine.yaml").write_text("plugins: [bench_mine]\nnum_tokens: ${recipe.num_tokens}\n")
    return str(tmp_path / "bench_mine.yaml")


@pytest.mark.parametrize("name", ["bench", "mini_bench"])
def test_a_projector_of_one_s_own_joins_by_one_key(own, name):
    without = [cell.id for cell in expand(parse([name]))]
    cells = expand(parse([name, f"projector+={own}"]))
    added = [cell for cell in cells if cell.id not in without]
    assert swept(added) == {"bench_mine"} and len(added) == len(cells) - len(without)
    assert len(added) == sum(cell.startswith(("avgpool-", "clip_vit_l_336-avgpool-", "siglip_so400m_384-avgpool-"))
                             for cell in without)  # fmt: skip
    assert all(cell.config.plugins == (["bench_mine"] if cell in added else []) for cell in cells)
    assert f"projector={own}" in dry_run(parse([name, f"projector+={own}"]), jobs=None)


def test_what_is_added_counts_in_any_order_and_may_be_a_control(own):
    added = [f"projector+={own}", f"controls+={own}"]
    for arguments in ([*added, "projector=avgpool,linear"], ["projector=avgpool,linear", *added]):
        spec = parse(["mini_bench", *arguments])
        assert swept(expand(spec)) == {"avgpool", "linear", "bench_mine"}
        assert spec.controls == [*parse(["mini_bench"]).controls, "bench_mine"]


def test_nothing_is_added_to_an_axis_that_is_not_there():
    with pytest.raises(ValueError, match="nothing is swept over recipe.lr so far: write recipe.lr="):
        parse(["mini_bench", "recipe.lr+=0.1"])
    with pytest.raises(ValueError, match="Unknown projector 'nothing'"):
        expand(parse(["mini_bench", "projector+=nothing"]))


def test_the_plan_knows_what_is_trained_at_all_patches_and_at_fewer(tmp_path, capsys):
    chosen = ["backbone=siglip_so400m_384", "projector=avgpool,linear,matryoshka,small_image,token_packer"]
    assert main(["plan", "bench", *chosen, "--json", str(tmp_path / "plan.json")]) == 0
    plans = {plan["name"]: plan["needs"] for plan in json.loads((tmp_path / "plan.json").read_text())}
    seen = {name: (needs["visual_in"], needs["visual_out"]) for name, needs in plans.items()}
    of = "siglip_so400m_384"
    assert seen[f"linear-{of}"] == (729, 729) and seen[f"{of}-avgpool-num_tokens64"] == (729, 64)
    assert seen[f"small_image-144-{of}"] == (144, 144) and seen[f"small_image-64-{of}"] == (64, 64)
    # A Matryoshka passes through the LLM once per number of tokens.
    hours = {name: needs["hours"] for name, needs in plans.items()}
    assert hours[f"matryoshka-144-{of}"] > 1.5 * hours[f"{of}-avgpool-num_tokens144"]
    assert hours[f"small_image-64-{of}"] < hours[f"{of}-avgpool-num_tokens64"] < hours[f"linear-{of}"]
    capsys.readouterr()
