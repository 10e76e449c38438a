"""The configuration that a run stores: given back to `train`, and read from a folder of somebody else's."""

import sys

import pytest
from omegaconf import OmegaConf

from prism_deco.config import (
    changed_from_defaults,
    choices,
    default_run_id,
    flat,
    load_config,
    named_choice,
    parse_value,
    read_config,
    save_config,
    value_origins,
    value_text,
)
from prism_deco.config.choices import resolve_asks, resolve_benchmarks
from prism_deco.stages import split


def _stored(folder, *overrides, run_id=None):
    config = load_config(overrides)
    config.run_id = run_id or default_run_id(config)
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml", OmegaConf.to_container(config, resolve=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["projector=linear", "recipe=prism", "recipe.lr=1e-4", "evaluate.benchmarks=null", "recipe.betas=[0.8,0.9]"],
        ["backbone=mini_dinov2_siglip", "llm=mini_phi", "recipe.num_tokens=9", "projector.num_tokens=4"],
        ["data=llava", "data.json=007", "data.image_root=a #b", "data.val_fraction=0.1", "seed=3"],
        ["trainer=fsdp", "llm=vicuna_7b_v1_5", "llm.architecture.num_hidden_layers=2", "backbone.resize=pad"],
    ],
)
def test_a_stored_configuration_composes_to_itself(overrides, tmp_path):
    path, content = _stored(tmp_path / "x", *overrides, run_id="mine")
    assert OmegaConf.to_container(load_config([str(path)]), resolve=True) == content


@pytest.mark.parametrize("group", ["backbone", "projector", "llm", "data", "recipe", "trainer"])
def test_every_shipped_choice_is_found_again(group, tmp_path):
    for choice in choices(group):
        path, content = _stored(tmp_path / "x", f"{group}={choice}")
        if group != "recipe" or not content["recipe"]["stages"]:
            again = load_config([str(path), f"run_id={content['run_id']}"])
            assert OmegaConf.to_container(again, resolve=True) == content, choice


def test_references_of_the_choices_still_refer(tmp_path):
    path, _ = _stored(tmp_path / "x", "recipe.num_tokens=9", "recipe.resize=pad")
    config = load_config([str(path), "recipe.num_tokens=4", "recipe.resize=resize-crop"])
    assert (config.projector.num_tokens, config.backbone.resize) == (4, "resize-crop")
    path, _ = _stored(tmp_path / "x", "recipe.num_tokens=9", "projector.num_tokens=16")
    assert load_config([str(path), "recipe.num_tokens=4"]).projector.num_tokens == 16


def test_a_changed_choice_replaces_what_the_run_said_of_it(tmp_path):
    path, _ = _stored(tmp_path / "x", "projector=c_abstractor", "projector.hidden_dim=96", "recipe.lr=1e-4")
    config = load_config(["projector=linear", "seed=8", str(path)])
    assert (config.projector.name, config.recipe.lr) == ("linear", 1e-4)
    assert "hidden_dim" not in config.projector
    assert config.run_id is None, "the derived name follows the choices"
    path, _ = _stored(tmp_path / "x", run_id="mine")
    assert load_config([str(path), "seed=8"]).run_id == "mine"


def test_a_yaml_that_is_gone_is_not_needed(tmp_path):
    own = tmp_path / "narrow.yaml"
    own.write_text("num_tokens: 4\nmlp_depth: 1\nwidth: 3\n")
    path, content = _stored(tmp_path / "x", f"projector={own}", run_id="mine")
    own.unlink()
    config = load_config([str(path)])
    assert OmegaConf.to_container(config.projector) == content["projector"]
    assert load_config([str(path), "projector.width=5"]).projector.width == 5


def test_the_run_of_a_recipe_with_stages_is_repeated_alone(tmp_path):
    last = split(["recipe=mini_two_stage", f"runs_dir={tmp_path}", "run_id=x"])[-1]
    (tmp_path / "x").mkdir()
    save_config(last.config, tmp_path / "x/config.yaml")
    path = str(tmp_path / "x/config.yaml")
    assert split([path]) == []
    config = load_config([path])
    assert (config.recipe.name, config.recipe.stages) == ("mini_finetune", None)
    assert config.recipe.start_from == str(tmp_path / "x-align")
    assert flat(config) == flat(last.config)


def test_a_yaml_of_ones_own_names_choices_and_settings(tmp_path):
    path = tmp_path / "mine.yml"
    path.write_text(
        "projector: c_abstractor\nrecipe: {lr: 1e-4}\ntrainer: {name: ddp, devices: 2}\nevaluate: {benchmarks: null}\n"
        "run_id: 007\nseed: ${recipe.epochs}\n"
    )
    config = load_config([str(path), "recipe=prism", "trainer.devices=4"])
    assert (config.projector.name, config.projector.depth, config.run_id, config.seed) == ("c_abstractor", 3, "007", 1)
    assert (config.recipe.name, config.recipe.lr, config.recipe.sampler) == ("prism", 1e-4, "prismatic")
    assert (config.trainer.name, config.trainer.strategy, config.trainer.devices) == ("ddp", "ddp", 4)
    assert config.evaluate.benchmarks is None
    assert named_choice("recipe", [str(path)]) is None and named_choice("projector", [str(path)]) == "c_abstractor"
    path.write_text("recipe: mini_two_stage\n")
    assert [stage.name for stage in split([str(path), f"runs_dir={tmp_path}"])] == ["align", "finetune"]


def test_a_run_s_folder_leads_to_its_configuration(tmp_path):
    path, _ = _stored(tmp_path / "run")
    with pytest.raises(ValueError, match=f"run is a run's folder: name its configuration, {path}"):
        load_config([str(tmp_path / "run")])


def test_lists_of_names_are_the_same_in_brackets_in_quotes_and_in_a_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("evaluate:\n  benchmarks: [mini_pope, mini_gqa]\n  ask: [as_trained, other]\n")
    given = ["evaluate.benchmarks=['mini_pope', \"mini_gqa\"]", "evaluate.ask=[as_trained, other]"]
    for arguments in ([str(path)], given):
        config = load_config(arguments).evaluate
        assert resolve_benchmarks(config.benchmarks) == ["mini_pope", "mini_gqa"]
        assert resolve_asks(config.ask) == ["as_trained", "other"]
    path.write_text("evaluate: {benchmarks: [mini_poep]}\n")
    with pytest.raises(ValueError, match="Did you mean 'mini_pope'"):
        resolve_benchmarks(load_config([str(path)]).evaluate.benchmarks)


def test_the_way_to_write_names_is_said(tmp_path):
    path, _ = _stored(tmp_path, "evaluate.benchmarks=mini")
    path.write_text(path.read_text().replace("benchmarks: mini", "benchmarks: [mini_pope]"))
    with pytest.raises(ValueError, match="must be names separated by commas such as a,b"):
        load_config([str(path)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "recipe: {learning_rate: 1}\n",
            r"Unknown key recipe\.learning_rate \(.*mine\.yaml\)\. Did you mean recipe\.lr ",
        ),
        ("lr: 1\n", r"Unknown key lr \(.*mine\.yaml\)\. Did you mean recipe\.lr\?"),
        ("recipe: {lr: fast}\n", r"recipe\.lr=fast must be a number \(.*mine\.yaml\)"),
        ("recipe: 3\n", "Unknown recipe '3'"),
        ("recipe: [a]\n", r"mine\.yaml: recipe must be the name of a choice, or settings"),
        ("seed: -1\n", "seed=-1 must be at least 0"),
        ("axes: {seed: [1, 2]}\n", r"mine\.yaml is a sweep: `prism-deco sweep .*mine\.yaml` trains its cells"),
    ],
)
def test_mistakes_in_a_yaml_of_ones_own_are_named(content, message, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_config([str(path)])
    with pytest.raises(ValueError, match=r"no\.yaml: there is no such file"):
        load_config([str(tmp_path / "no.yaml")])


@pytest.mark.parametrize(
    ("key", "value"),
    [("recipe.name", "${oc.env:SECRET}"), ("llm.special_tokens.bos_token", "x ${seed}"), ("plugins", ["${oc.env:A}"])],
)
def test_a_stored_configuration_resolves_nothing(key, value, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    config = load_config()
    OmegaConf.update(config, key, "plain" if isinstance(value, str) else ["plain"])
    save_config(config, tmp_path / "config.yaml")
    text = value if isinstance(value, str) else value[0]
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("plain", f"'{text}'"))
    for read in (lambda: read_config(path), lambda: load_config([str(path)])):
        with pytest.raises(ValueError, match=rf"config\.yaml: {key} is a reference") as refused:
            read()
        assert "hunter2" not in str(refused.value)
    # One's own command line and files may use the environment.
    path.rename(tmp_path / "mine.yaml").write_text("run_id: ${oc.env:SECRET}\n")
    assert load_config([str(tmp_path / "mine.yaml")]).run_id == "hunter2"
    assert load_config(["run_id=${oc.env:SECRET}"]).run_id == "hunter2"


def test_plugins_of_a_stored_configuration_are_named_by_the_user(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path, _ = _stored(tmp_path / "x", "plugins=[stranger]")
    with pytest.raises(ValueError, match=r"config\.yaml names plug-in modules: stranger\..*plugins=\[stranger\]"):
        load_config([str(path)])
    assert list(load_config([str(path), "plugins=[stranger]"]).plugins) == ["stranger"]
    assert list(load_config([str(path), "plugins=[]"]).plugins) == []
    # Nor does a benchmark's YAML that a stored configuration leads to name any; one that the user chooses does.
    benchmark = tmp_path / "theirs.yaml"
    benchmark.write_text("plugins: [stranger]\nfamily: pope\n")
    stored, _ = _stored(tmp_path / "y", f"evaluate.benchmarks={benchmark}")
    stored.write_text(stored.read_text().replace("plugins:\n- stranger\n", "plugins: []\n"))
    assert list(load_config([str(stored)]).plugins) == []
    assert list(load_config([f"evaluate.benchmarks={benchmark}"]).plugins) == ["stranger"]
    assert value_origins([f"evaluate.benchmarks={benchmark}"])["plugins"] == "default, and stranger by a choice's YAML"
    assert "stranger" not in sys.modules
    benchmark.write_text("plugins: stranger\n")
    with pytest.raises(ValueError, match=r"theirs\.yaml: plugins must be a list of modules such as \[a, b\], not 'str"):
        load_config([f"evaluate.benchmarks={benchmark}"])


def test_what_a_run_changed_of_its_choices():
    config = load_config(["projector=maxpool", "recipe.lr=2e-5", "recipe.num_tokens=9", "data.limit=10", "run_id=007"])
    changed = {"recipe.lr": 2e-5, "recipe.num_tokens": 9, "data.limit": 10, "run_id": "007"}
    assert changed_from_defaults(config) == changed
    texts = [f"{key}={value_text(key, value)}" for key, value in changed.items()]
    assert texts == ["recipe.lr=2e-5", "recipe.num_tokens=9", "data.limit=10", "run_id=007"]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("recipe.lr", 3e-4, "3e-4"), ("recipe.lr", 1.25e-9, "1.25e-9"), ("recipe.lr", 0.25, "0.25"),
        ("recipe.lr", 1e-3, "0.001"),
        ("recipe.lr", 1.23456789e-5, "1.23456789e-05"),
        ("run_id", "on", "on"), ("run_id", "null", '"null"'), ("run_id", None, "null"), ("run_id", "'a'", '"\'a\'"'),
        ("note", "on", '"on"'), ("note", "a b", "a b"), ("note", [1, "a"], '[1, "a"]'), ("note", True, "true"),
        ("note", {"a": None}, '{"a": null}'), ("note", "ä: b", '"ä: b"'),
    ],
)  # fmt: skip
def test_the_text_of_a_value_is_read_back(key, value, text):
    assert value_text(key, value) == text
    assert parse_value(key, text) == value


def test_where_each_value_comes_from(tmp_path):
    own = tmp_path / "mine.yaml"
    own.write_text("evaluate: {limit: 5}\nrecipe: {lr: 1e-4}\n")
    origins = value_origins([str(own), "projector=avgpool", "seed=8", "data.statistics={images: 3}"])
    assert origins["seed"] == origins["data.statistics.images"] == "command line"
    assert origins["evaluate.limit"] == origins["recipe.lr"] == str(own)
    assert origins["evaluate.benchmarks"] == "conf/config.yaml"
    assert origins["recipe.token_scale"] == "conf/recipe/mini.yaml"
    assert origins["projector.num_tokens"] == "conf/projector/avgpool.yaml, ${recipe.num_tokens}"
    assert origins["backbone.resize"] == "default, ${recipe.resize}"
    assert origins["recipe.epochs"] == origins["runs_dir"] == "default"
    assert set(origins) == set(flat(load_config()))
