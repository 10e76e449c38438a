"""Where the schema says text, a value is the text as it stands, whatever YAML would make of it."""

import inspect

import pytest

from prism_deco.config import load_choice, load_config, parse_value
from prism_deco.config.values import TEXT_OPTIONS
from prism_deco.evaluation import build_benchmark
from prism_deco.stages import split
from prism_deco.sweep import parse
from prism_deco.sweep.expand import expand
from prism_deco.sweep.spec import SLURM_NOT_TEXT


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("run_id", "20240101_1530"),
        ("run_id", "007"),
        ("run_id", "1e3"),
        ("run_id", "on"),
        ("run_id", "12:30:45"),
        ("runs_dir", "/data/runs #2"),
        ("runs_dir", "0x10"),
        ("evaluate.split", "2017"),
        ("evaluate.benchmarks", "off"),
        ("backbone.weights", "weights: final.pt"),
        ("backbone.model", "1_000"),
        ("llm.hub", "@me/model"),
        ("llm.dtype", "%x"),
        ("recipe.start_from", "*runs"),
        ("llm.tokenizer", "007"),
    ],
)
def test_text_stands_as_it_is_given(key, text):
    group, _, leaf = key.rpartition(".")
    config = load_config([f"{key}={text}"])
    assert (config[group] if group else config)[leaf] == text


@pytest.mark.parametrize(
    ("data", "key", "text"),
    [
        ("llava", "json", "/photos/a #1.json"),
        ("llava", "image_root", "2024"),
        ("llava", "val_json", "1_0"),
        ("embedded", "path", "[a].parquet"),
        ("llava_v1_5_mix665k", "root", "007"),
    ],
)
def test_a_path_whose_default_is_null_is_text(data, key, text):
    assert load_config([f"data={data}", f"data.{key}={text}"]).data[key] == text


def test_paths_of_benchmarks_and_settings_of_stages_are_text(tmp_path):
    config = load_config(["benchmark.vqav2.root=007", "benchmark.vqav2.limit=007", "benchmark.gqa.split=a #b"])
    assert config.benchmark == {"vqav2": {"root": "007", "limit": 7}, "gqa": {"split": "a #b"}}
    last = split(["recipe=mini_two_stage", f"runs_dir={tmp_path}", "finetune.evaluate.split=007"])[-1]
    assert last.config.evaluate.split == "007"


def test_lists_of_a_benchmark_are_texts_wherever_they_are_given(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("benchmark: {mini_pope: {choices: [Yes, No]}}\n")
    for given in ("benchmark.mini_pope.choices=[Yes,No]", "benchmark.mini_pope.choices=['Yes', 'No']", str(path)):
        keys = load_config([given]).benchmark["mini_pope"]
        assert list(build_benchmark("mini_pope", **keys).choices) == ["Yes", "No"]


def test_a_commit_is_text():
    assert load_config(["llm=phi2", "llm.revision=12345e67"]).llm.revision == "12345e67"


def test_null_quotes_and_references_keep_their_meaning():
    config = load_config(["run_id=null", "evaluate.benchmarks=", "runs_dir='007'", "backbone.resize=${recipe.resize}"])
    assert (config.run_id, config.evaluate.benchmarks, config.runs_dir) == (None, None, "007")
    assert config.backbone.resize == config.recipe.resize == "letterbox"
    assert load_config(['run_id="null"']).run_id == "null"


def test_two_names_stay_two_runs():
    names = ["7", "07", "007", "0x7", "7.0", "+7"]
    assert [load_config([f"run_id={name}"]).run_id for name in names] == names


def test_numbers_stay_numbers():
    config = load_config(["recipe.lr=1e-4", "recipe.max_steps=1_000", "projector.mlp_ratio=4", "data.train_images=10"])
    assert (config.recipe.lr, config.recipe.max_steps, config.projector.mlp_ratio) == (1e-4, 1000, 4)
    assert config.data.train_images == 10


def test_the_home_folder_is_written_out_where_a_shell_does_not(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    config = load_config(["data=llava", "data.json=~/mix.json", "data.image_root='~/images'"])
    assert config.data.json == "/home/ada/mix.json"
    assert config.data.image_root == "~/images"


def test_a_yaml_of_ones_own_may_leave_out_the_quotes(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("family: llava\njson: 2024\nimage_root: 007  # the images\nlimit: 0x10\n")
    data = load_config([f"data={path}"]).data
    assert (data.json, data.image_root, data.limit) == ("2024", "007", 16)
    assert load_choice("data", str(path))["json"] == "2024"


def test_labels_and_settings_of_a_sweep_are_the_texts(tmp_path):
    cells = expand(parse(["runs_dir=1_0", "evaluate.split=007,1e3", "seed=1"]))
    assert [cell.labels["evaluate.split"] for cell in cells] == ["007", "1e3"]
    assert [cell.config.evaluate.split for cell in cells] == ["007", "1e3"]
    assert [cell.id for cell in cells] == ["split007", "split1e3"]
    path = tmp_path / "mine.yaml"
    path.write_text("settings: {evaluate.split: 0_1}\naxes: {data.image_root: [007, 0x7], recipe.lr: [1e-3]}\n")
    cells = expand(parse([str(path), "data=llava"]))
    assert [cell.config.data.image_root for cell in cells] == ["007", "0x7"]
    assert [cell.labels["data.image_root"] for cell in cells] == ["007", "0x7"]
    assert [(cell.config.evaluate.split, cell.labels["recipe.lr"]) for cell in cells] == [("0_1", 1e-3)] * 2


def test_names_and_labels_of_a_sweep_are_the_texts(tmp_path):
    path = tmp_path / "mine.yaml"
    labels = ["{row: 010, seed: 3, recipe.num_tokens: 36, recipe.blind: true}", "{row: 2024_01}", "{row: 1e3}"]
    rows = "".join(f"- labels: {label}\n" for label in [*labels, "{row: on}"])
    path.write_text(f"name: 20240101_1530\nrows:\n{rows}")
    assert parse([str(path)]).folder.name == "20240101_1530"
    cells = expand(parse([str(path)]))
    assert [cell.labels["row"] for cell in cells] == ["010", "2024_01", "1e3", "on"]
    assert [cell.id for cell in cells] == ["010-3-36-blind", "2024_01", "1e3", "on"]
    assert [cell.id for cell in expand(parse([str(path), "row=010,on"]))] == ["010-3-36-blind", "on"]
    path.write_text("parts:\n  010: {axes: {seed: [1]}}\n  011: {axes: {seed: [3]}, choose: {recipe.lr: 010}}\n")
    assert [(grid.name, grid.choose) for grid in parse([str(path)]).grids] == [
        ("010", {}),
        ("011", {"recipe.lr": "010"}),
    ]


def test_options_of_jobs_are_texts_unless_slurm_counts_with_them():
    spec = parse(
        ["seed=1,2", "launcher=slurm", "slurm.account=007", "slurm.partition=1e3", "slurm.time=60", "slurm.mem=0x8",
         "slurm.setup=[module load cuda]", "slurm.exclusive=true", "slurm.comment=a #b"]
    )  # fmt: skip
    assert spec.slurm == {
        "account": "007", "partition": "1e3", "time": 60, "mem": "0x8", "setup": ["module load cuda"],
        "exclusive": True, "comment": "a #b",
    }  # fmt: skip


def test_the_options_that_are_not_text_are_those_of_submitit():
    slurm = pytest.importorskip("submitit.slurm.slurm")
    options = inspect.signature(slurm._make_sbatch_string).parameters
    texts = {name for name, p in options.items() if p.annotation in ("str", str, "tp.Optional[str]")}
    texts |= {name for name, p in options.items() if str(p.annotation) in ("typing.Optional[str]", "str | None")}
    assert texts and not texts & set(SLURM_NOT_TEXT)
    assert set(SLURM_NOT_TEXT) <= {*options}


def test_every_path_of_a_shipped_yaml_is_declared_as_text():
    for group, keys in TEXT_OPTIONS.items():
        for key in keys:
            assert parse_value(f"{group}.{key}", "007") == "007"
