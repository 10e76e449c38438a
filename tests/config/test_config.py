from pathlib import Path

import pytest
from omegaconf import OmegaConf

from prism_deco.cli import main
from prism_deco.config import CONF_DIR, GROUPS, choices, load_choice, load_config, read_config, save_config
from prism_deco.errors import UsageError
from prism_deco.sweep import parse


@pytest.mark.parametrize(
    ("group", "choice"), [(group, choice) for group in GROUPS for choice in choices(group)], ids=lambda value: value
)
def test_every_shipped_yaml_fits_the_schema(group, choice):
    config = load_config([f"{group}={choice}"])
    assert config[group].name == choice
    for key, value in load_choice(group, choice).items():
        if key == "prompt_sets":  # a set is resolved, and none is chosen here unless the recipe does
            continue
        if not (isinstance(value, str) and "${" in value):
            found = config[group][key]
            found = OmegaConf.to_container(found) if OmegaConf.is_config(found) else found
            assert found == (tuple(value) if isinstance(found, tuple) else value), key


def test_every_group_folder_is_a_key_of_the_configuration():
    folders = {path.name for path in CONF_DIR.iterdir() if path.is_dir()}
    assert set(GROUPS) <= folders
    assert folders - set(GROUPS) <= {"benchmark", "sweep"}


def test_overrides_replace_choices_and_keys():
    config = load_config(["recipe=prism", "recipe.lr=1e-4", "seed=3", "projector=maxpool", "backbone.image_size=96"])
    assert (config.recipe.name, config.recipe.lr, config.seed) == ("prism", 1e-4, 3)
    assert (config.projector.name, config.backbone.image_size) == ("maxpool", 96)


def test_the_projector_takes_its_token_count_from_the_recipe_unless_told():
    assert load_config(["recipe=prism", "projector=avgpool"]).projector.num_tokens == 144
    assert load_config(["projector=avgpool", "recipe.num_tokens=9"]).projector.num_tokens == 9
    assert load_config(["projector=avgpool", "projector.num_tokens=4"]).projector.num_tokens == 4
    assert load_config(["projector=linear"]).projector.num_tokens is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("projector=avgpol", r"Unknown projector 'avgpol'\. Did you mean 'avgpool'"),
        ("recipe.learning_rate=1", r"Unknown key recipe\.learning_rate\. Did you mean recipe\.lr "),
        ("recipe.batch_size=1", r"Did you mean recipe\.global_batch_size or "),
        ("data.json=a.json", r"Unknown key data\.json\. It is a key of data=llava "),
        ("projector.hidden_dim=96", r"It is a key of projector=c_abstractor or projector=d_abstractor or "),
        ("recipe.epoch=1", r"Did you mean recipe\.epochs"),
        ("data.lr=1", r"Unknown key data\.lr\. Did you mean recipe\.lr"),
        ("modle=1", r"Unknown key modle"),
        ("recipe.lr=fast", r"^recipe\.lr=fast must be a number\.$"),
        ("recipe.lr=[1]", r"^recipe\.lr=\[1\] must be a number\.$"),
        ("recipe.epochs=1.5", r"^recipe\.epochs=1\.5 must be a whole number\.$"),
        ("recipe.epochs=null", r"^recipe\.epochs=null must be a whole number\.$"),
        ("recipe.max_steps=many", r"^recipe\.max_steps=many must be a whole number or null\.$"),
        ("recipe.betas=0.9", r"^recipe\.betas=0\.9 must be two numbers such as \[0\.9, 0\.95\]\.$"),
        ("recipe.betas=[0.9]", r"^recipe\.betas=\[0\.9\] must be two numbers"),
        ("recipe.lr.x=1", r"Unknown key recipe\.lr\.x\."),
        ("recipe.stages=[a]", r"^recipe\.stages=\[\"a\"\] must be a mapping such as .* or null\.$"),
        ("plugins=mine", r"^plugins=mine must be a list of names such as \[a, b\]\.$"),
        ("trainer.preflight=maybe", r"^trainer\.preflight=maybe must be true or false\.$"),
        ("runs_dir=null", r"^runs_dir=null must be text\.$"),
        ("benchmark=pope", r"^benchmark=pope must be set key by key.*evaluate\.benchmarks=NAME chooses benchmarks"),
        ("evaluate=mini", r"^evaluate=mini must be set key by key, for example evaluate\.benchmarks="),
        ("backbone.image_size=${", r"^backbone\.image_size=\$\{: .*not valid YAML"),
        ("run_id=${", r"^run_id=\$\{ is not a valid reference: "),
        ("projector.mlp_depth=deep", r"^projector\.mlp_depth=deep must be a whole number or null\.$"),
        ("seed", r"'seed' is not an override: write key=value"),
        ("data=./mine.yaml", r"data=\./mine\.yaml: there is no such file"),
        ("recipe.lr=[1", r"recipe\.lr=\[1: the value of recipe\.lr is not valid YAML"),
    ],
)
def test_mistakes_name_the_key_and_what_was_expected(override, message):
    with pytest.raises(ValueError, match=message):
        load_config([override])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"lr: 1\nbetas: [0.9\n", "line 3: not valid YAML"),
        (b"lr: 1\nepochs: 2\nlr: 2\n", "line 3: not valid YAML .*duplicate key lr"),
        (b"lr: ${\n", ": not valid YAML"),
        (b"lr: 1\x00\n", ": not valid YAML"),
        (b"\x80PNG", ": not a UTF-8 text file"),
        (b"- lr\n", ": expected `key: value` lines"),
        (b"lr 1\n", ": expected `key: value` lines"),
        (b"3\n", ": expected `key: value` lines"),
    ],
)
def test_a_broken_yaml_is_named(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(content)
    readers = (lambda: load_config([f"recipe={path}"]), lambda: load_config([f"projector={path}"]),
               lambda: read_config(path), lambda: parse([str(path)]))  # fmt: skip
    for read in readers:
        with pytest.raises(ValueError, match=f"{path}.*{message}"):
            read()


def test_an_empty_yaml_changes_nothing(tmp_path):
    path = tmp_path / "plain.yaml"
    path.write_text("# nothing yet\n")
    assert load_config([f"recipe={path}"]).recipe.epochs == 1


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["evaluate", "runs/x", "plugins=[x"], "plugins"),
        (["explain", "runs/x", "plugins=[x"], "plugins"),
        (["sweep", "seed=1,2", "slurm.time=[1", "--dry-run"], "slurm.time"),
        (["train", "recipe.betas=[1", "--check"], "recipe.betas"),
    ],
)
def test_a_broken_value_is_named_by_every_command(arguments, key, capsys):
    assert main(arguments) == 2
    assert f"the value of {key} is not valid YAML" in " ".join(capsys.readouterr().err.split())


def test_the_strict_recipe_holds_nothing_out_unless_told():
    assert load_config(["recipe=prism", "data=llava"]).data.val_fraction == 0
    assert load_config(["recipe=prism", "data=llava", "data.val_fraction=0.1"]).data.val_fraction == 0.1
    assert load_config(["data=llava"]).data.val_fraction == 0.005


def test_a_yaml_of_the_users_own_is_a_choice(tmp_path):
    path = tmp_path / "gentle.yaml"
    path.write_text("lr: 1e-6\nepochs: 2\n")
    recipe = load_config([f"recipe={path}"]).recipe
    assert (recipe.name, recipe.lr, recipe.epochs, recipe.global_batch_size) == ("gentle", 1e-6, 2, 128)


def test_a_saved_configuration_is_read_back_equal(tmp_path: Path):
    config = load_config(["recipe=prism", "projector=avgpool", "seed=11"])
    save_config(config, tmp_path / "config.yaml")
    again = read_config(tmp_path / "config.yaml")
    assert OmegaConf.to_container(again) == OmegaConf.to_container(config, resolve=True)
    assert "${" not in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("on", True), ("'off'", False), ("false", False)])
def test_the_feature_cache_is_a_switch(text, expected):
    assert load_config([f"trainer.feature_cache={text}"]).trainer.feature_cache is expected


def test_retired_keys_are_refused_with_the_reason_and_read_from_earlier_runs(tmp_path):
    with pytest.raises(UsageError, match=r"trainer\.feature_cache=auto: auto is no longer a choice.*use true where"):
        load_config(["trainer.feature_cache=auto"])
    with pytest.raises(UsageError, match=r"trainer\.feature_cache_runs: only trainer\.feature_cache=auto used it"):
        load_config(["trainer.feature_cache_runs=2"])
    config = load_config([])
    save_config(config, tmp_path / "config.yaml")
    text = (tmp_path / "config.yaml").read_text()
    for earlier, now in (("auto", False), ("'on'", True), ("'True'", True), ("'off'", False)):
        old = text.replace("feature_cache: false", f"feature_cache: {earlier}\n  feature_cache_runs: 3")
        assert old != text
        (tmp_path / "config.yaml").write_text(old)
        assert read_config(tmp_path / "config.yaml").trainer.feature_cache is now
