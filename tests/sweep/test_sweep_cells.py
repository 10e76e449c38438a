"""From a command line to cells, against lists written by hand."""

import functools

import pytest

from prism_deco.cli import main
from prism_deco.config import choices, is_free, load_config, save_config
from prism_deco.config.choices import resolve_benchmarks
from prism_deco.sweep import expand, parse
from prism_deco.sweep.spec import split_values

GENERALIZATION = {  # the rows of the paper's Table 3
    "B1": ("siglip_so400m_224", "phi2"),
    "B2": ("clip_vit_l_336", "phi2"),
    "B3": ("siglip_so400m_384", "phi2"),
    "B4": ("dinov2_siglip_384", "phi2"),
    "B5": ("dinov2_siglip_384", "qwen1_5_0_5b_chat"),
    "B6": ("dinov2_siglip_384", "vicuna_7b_v1_5"),
}
MINI = {
    "M1": ("mini_clip", "mini_qwen2"),
    "M2": ("mini_siglip", "mini_qwen2"),
    "M3": ("mini_dinov2_siglip", "mini_qwen2"),
}
MINI_GENERALIZATION = {
    "B1": ("mini_siglip", "mini_phi"),
    "B2": ("mini_clip", "mini_phi"),
    "B3": ("mini_siglip", "mini_phi"),
    "B4": ("mini_dinov2_siglip", "mini_phi"),
    "B5": ("mini_dinov2_siglip", "mini_qwen2"),
    "B6": ("mini_dinov2_siglip", "mini_llama"),
}


@functools.cache
def _cells(*arguments: str):
    return expand(parse(arguments))


@pytest.mark.parametrize(
    ("name", "rows"),
    [("generalization", GENERALIZATION), ("mini", MINI), ("mini_generalization", MINI_GENERALIZATION)],
)
def test_the_shipped_grids_are_those_of_the_tables(name, rows):
    cells = _cells(name)
    projectors = ("c_abstractor", "avgpool")
    assert [cell.id for cell in cells] == [f"{row}-{projector}" for row in rows for projector in projectors]
    for cell, (row, projector) in zip(cells, [(r, p) for r in rows for p in projectors], strict=True):
        assert cell.labels == {"row": row, "projector": projector}
        assert (cell.config.backbone.name, cell.config.llm.name) == rows[row]
        assert cell.config.projector.name == projector
        assert cell.config.seed == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(choices("sweep")) - {"generalization", "mini", "mini_generalization"}))
def test_every_other_shipped_sweep_composes(name):
    assert len(_cells(name)) > 1


def test_the_paper_s_grid_is_trained_and_scored_as_in_the_paper():
    for cell in _cells("generalization"):
        config = cell.config
        assert (config.recipe.name, config.trainer.name, config.data.name) == ("deco", "fsdp", "llava_v1_5_mix665k")
        assert (config.evaluate.benchmarks, config.projector.num_tokens) == ("table3", 144)


def test_the_miniature_grids_differ_in_what_the_real_one_differs_in():
    cells = {cell.id: cell.config for cell in _cells("mini_generalization")}
    assert {name: config.backbone.image_size for name, config in cells.items() if config.backbone.image_size} == {
        "B1-c_abstractor": 48, "B1-avgpool": 48,
    }  # fmt: skip
    assert {config.projector.get("hidden_dim") for name, config in cells.items() if "c_abstractor" in name} == {96}
    assert all(config.trainer.threads == 1 and config.recipe.name == "mini" for config in cells.values())
    assert parse(["mini"]).jobs == 2


def test_free_axes_multiply_in_the_order_given():
    cells = _cells(
        "backbone=clip_vit_l_336,siglip_so400m_384", "llm=phi2", "projector=avgpool,c_abstractor",
        "backbone.image_size=224,336", "data.limit=1000",
    )  # fmt: skip
    assert [cell.id for cell in cells] == [
        "clip_vit_l_336-avgpool-image_size224", "clip_vit_l_336-avgpool-image_size336",
        "clip_vit_l_336-c_abstractor-image_size224", "clip_vit_l_336-c_abstractor-image_size336",
        "siglip_so400m_384-avgpool-image_size224", "siglip_so400m_384-avgpool-image_size336",
        "siglip_so400m_384-c_abstractor-image_size224", "siglip_so400m_384-c_abstractor-image_size336",
    ]  # fmt: skip
    assert cells[3].overrides == (
        "llm=phi2", "data.limit=1000", "backbone=clip_vit_l_336", "projector=c_abstractor", "backbone.image_size=336",
    )  # fmt: skip
    assert cells[3].labels == {"backbone": "clip_vit_l_336", "projector": "c_abstractor", "backbone.image_size": 336}
    assert (cells[3].config.backbone.image_size, cells[3].config.data.limit) == (336, 1000)


def test_seeds_are_an_axis_that_labels_carry():
    cells = _cells("mini", "seed=7,8", "recipe.max_steps=100", "row=M2")
    assert [cell.id for cell in cells] == [
        "M2-c_abstractor-seed7", "M2-c_abstractor-seed8", "M2-avgpool-seed7", "M2-avgpool-seed8",
    ]  # fmt: skip
    assert cells[1].labels == {"row": "M2", "projector": "c_abstractor", "seed": 8}
    assert [cell.config.seed for cell in cells] == [7, 8, 7, 8]
    assert {cell.config.recipe.max_steps for cell in cells} == {100}


def test_the_command_line_replaces_an_axis_and_its_choices_bring_their_settings():
    (cell, *_) = cells = _cells("mini", "projector=qformer")
    assert [cell.id for cell in cells] == ["M1-qformer", "M2-qformer", "M3-qformer"]
    assert (cell.config.projector.hidden_dim, cell.config.projector.heads) == (96, 4)
    (cell, *_) = _cells("mini", "projector=qformer", "projector.heads=8")
    assert (cell.config.projector.hidden_dim, cell.config.projector.heads) == (96, 8)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a,b", ["a", "b"]),
        ("a", ["a"]),
        ("[1,2],[3,4]", ["[1,2]", "[3,4]"]),
        ("{a: 1, b: [2, 3]},null", ["{a: 1, b: [2, 3]}", "null"]),
        ("'a,b',\"c,'d\"", ["'a,b'", '"c,\'d"']),
        ("1e-3, 2e-3", ["1e-3", "2e-3"]),
        ("", [""]),
    ],
)
def test_commas_inside_brackets_and_quotes_do_not_separate(text, values):
    assert split_values(text) == values


def test_lists_are_values_and_a_list_of_benchmarks_is_no_axis():
    cells = _cells("recipe.betas=[0.9,0.95],[0.9,0.999]", "evaluate.benchmarks=mini_pope,mini_gqa")
    assert [cell.id for cell in cells] == ["betas0.9_0.95", "betas0.9_0.999"]
    assert [tuple(cell.config.recipe.betas) for cell in cells] == [(0.9, 0.95), (0.9, 0.999)]
    assert cells[0].config.evaluate.benchmarks == "mini_pope,mini_gqa"


def test_a_sweep_s_yaml_may_list_benchmarks(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("settings:\n  evaluate.benchmarks: [mini_pope, mini_gqa]\naxes: {seed: [1, 2]}\n")
    cells = expand(parse([str(path)]))
    assert len(cells) == 2
    for cell in cells:
        assert resolve_benchmarks(cell.config.evaluate.benchmarks) == ["mini_pope", "mini_gqa"]
        assert resolve_benchmarks(load_config(cell.overrides).evaluate.benchmarks) == ["mini_pope", "mini_gqa"]


def test_a_run_s_configuration_is_no_sweep(tmp_path, capsys):
    save_config(load_config(), tmp_path / "config.yaml")
    assert main(["sweep", str(tmp_path / "config.yaml")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"`prism-deco train {tmp_path / 'config.yaml'}`" in said and "Unknown key" not in said


def test_a_yaml_of_the_user_s_own_is_a_sweep_and_a_choice(tmp_path):
    (tmp_path / "gentle.yaml").write_text("lr: 1e-6\n")
    (tmp_path / "mine.yaml").write_text(
        f"settings: {{llm: mini_phi}}\nrows:\n- labels: {{tower: C}}\n  settings: {{backbone: mini_clip}}\n"
        f"axes: {{recipe: [mini, {tmp_path}/gentle.yaml]}}\n"
    )
    spec = parse([str(tmp_path / "mine.yaml")])
    assert spec.name == "mine"
    assert [(cell.id, cell.labels["recipe"]) for cell in expand(spec)] == [("C-mini", "mini"), ("C-gentle", "gentle")]


def test_the_name_stays_when_values_are_added_and_changes_with_what_is_shared():
    name = parse(["projector=avgpool,maxpool", "recipe.lr=1e-3"]).name
    assert name.startswith("projector-")
    assert parse(["projector=avgpool,maxpool,linear", "recipe.lr=1e-3", "trainer.threads=1"]).name == name
    assert parse(["projector=avgpool,maxpool", "recipe.lr=2e-3"]).name != name
    assert parse(["projector=avgpool,maxpool", "name=mine"]).folder.as_posix() == "runs/mine"


def test_long_names_are_cut_but_stay_apart():
    texts = [f"data.json={'x' * 200}{end}" for end in ("a", "b")]
    cells = _cells(f"data.json={texts[0]},{texts[1]}", "data=llava")
    assert all(len(cell.id) == 100 for cell in cells) and cells[0].id != cells[1].id


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gneralization"], r"Unknown sweep 'gneralization'\. Did you mean 'generalization'"),
        (["mini", "generalization"], r"One sweep at a time"),
        ([], r"Nothing to sweep over.*projector=avgpool,c_abstractor.*generalization, mini"),
        (["llm=phi2"], r"Nothing to sweep over"),
        (["projector=avgpool,", "llm=phi2"], r"has an empty value"),
        (["mini", "llm=mini_phi"], r"llm distinguishes the rows of mini: select rows with row=NAME"),
        (["mini", "row=M4"], r"Unknown row 'M4'.*Choices: M1, M2, M3"),
        (["mini", "run_id=x"], r"run_id is generated for each cell.*name=NAME"),
        (["mini", "launcher=pbs"], r"Unknown launcher 'pbs'\. Choices: local, slurm"),
        (["llm=mini_phi,mini_fi", "seed=1,2"], r"Cell 3 of 4, mini_fi-seed1: Unknown llm 'mini_fi'\. Did you mean"),
        (["seed=1,2", "recipe.learning_rate=1"], r"Cell 1 of 2, seed1: Unknown key recipe\.learning_rate"),
        (["seed=1,2", "evaluate.benchmarks=mini_poep"], r"Cell 1 of 2, seed1: Unknown benchmark 'mini_poep'"),
        (["seed=1,1"], r"Two cells would share the folder seed1: seed=1 and seed=1\."),
        (["data.json=a/b,a:b", "data=llava"], r"Two cells would share the folder jsona_b"),
        (["run=logs,x"], r"Unknown key of a sweep 'run'"),
    ],
)
def test_mistakes_are_errors_before_anything_starts(arguments, message):
    with pytest.raises(ValueError, match=message):
        expand(parse(arguments))


def test_unknown_keys_of_a_sweep_s_yaml_are_errors(tmp_path):
    (tmp_path / "mine.yaml").write_text("setings: {llm: mini_phi}\n")
    with pytest.raises(ValueError, match=r"Unknown key of the sweep .*'setings'\. Did you mean 'settings'"):
        parse([str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("axes: {seed: [1, 2]}\nrows: [{label: {row: A}}]\n", "Unknown key of a row of the sweep .* 'label'.*'labels'"),
        ("axes: {seed: [1, 2]}\nparts: {a: {}}\n", "has parts"),
        (
            "axes: {seed: [1]}\nwith: {projector=avgpol: {seed: 1}}\n",
            "Unknown projector 'avgpol'. Did you mean 'avgpool'",
        ),
        ("axes: {seed: [1]}\nwith: {avgpool: {seed: 1}}\n", "has settings with avgpool: write GROUP=CHOICE"),
        ("parts: {a: {axis: {seed: [1]}}}\n", "Unknown key of the part a .* 'axis'. Did you mean 'axes'"),
        ("settings: [seed=1]\n", r"'settings' must hold KEY: VALUE pairs, not \['seed=1'\]"),
        ("rows: {labels: {row: a}}\n", "'rows' must hold a list"),
        ("rows: [a]\n", r"Expected KEY: VALUE pairs, each a key of .*; found 'a'"),
        ("rows: [{settings: [seed=1]}]\n", "'settings' must hold KEY: VALUE pairs"),
        ("axes: {seed: 3}\n", "'axes': seed must hold a list, not 3"),
        ("recipe: mini\nseed: 3\n", r"mine.yaml configures one run, which `prism-deco train .*mine.yaml` trains"),
        ("parts: {a: [seed=1]}\n", r"Expected KEY: VALUE pairs, each a key of .*; found \['seed=1'\]"),
    ],
)
def test_slips_in_a_sweep_s_yaml_are_named(text, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse([str(path)])


@pytest.mark.parametrize("key", ["launchr", "nam", "rwo"])
def test_keys_that_neither_a_sweep_nor_a_run_has_are_named(key):
    near = {"launchr": "launcher", "nam": "name", "rwo": "row"}[key]
    with pytest.raises(ValueError, match=f"Unknown key of a sweep '{key}'. Did you mean '{near}'"):
        parse(["mini", f"{key}=x"])


def test_where_a_cell_runs_is_not_what_it_is():
    assert [is_free(key) for key in ("trainer", "trainer.devices", "evaluate.limit", "recipe.micro_batch_size")] == [
        True, True, True, True,
    ]  # fmt: skip
    assert not any(map(is_free, ("seed", "recipe.lr", "data", "data.limit", "trainers", "recipe")))
