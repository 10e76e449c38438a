"""Values that fit their type and would train something else than meant, or end in a traceback."""

import re

import pytest

from prism_deco.cli import main
from prism_deco.config import load_config, read_config, save_config, schema
from prism_deco.data.samplers import SAMPLERS


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("recipe.lr=-1", "above 0"),
        ("recipe.lr=0", "above 0"),
        ("recipe.lr=nan", "finite and above 0"),
        ("recipe.lr=inf", "finite and above 0"),
        ("recipe.projector_lr=-1", "above 0"),
        ("recipe.epochs=0", "at least 1"),
        ("recipe.max_steps=0", "at least 1"),
        ("recipe.max_steps=-5", "at least 1"),
        ("recipe.global_batch_size=0", "at least 1"),
        ("recipe.micro_batch_size=0", "at least 1"),
        ("recipe.num_tokens=0", "at least 1"),
        ("recipe.warmup_ratio=2", "at least 0 and at most 1"),
        ("recipe.betas=[0.9,1.5]", "at least 0 and below 1, each"),
        ("recipe.betas=[-0.1,0.9]", "at least 0 and below 1, each"),
        ("recipe.grad_clip=-1", "at least 0"),
        ("recipe.weight_decay=-0.1", "at least 0"),
        ("recipe.val_fraction=1", "at least 0 and below 1"),
        ("backbone.image_size=0", "at least 1"),
        ("data.limit=0", "at least 1"),
        ("data.num_workers=-1", "at least 0"),
        ("trainer.log_every=0", "at least 1"),
        ("trainer.num_nodes=0", "at least 1"),
        ("trainer.keep_checkpoints=0", "at least 1"),
        ("trainer.checkpoint_every=0", "above 0"),
        ("trainer.threads=-1", "at least 1"),
        ("evaluate.batch_size=0", "at least 1"),
        ("evaluate.limit=0", "at least 1"),
        ("evaluate.relevance_limit=0", "at least 1"),
        ("seed=-1", "at least 0 and at most 4294967295"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_bounds(override, allowed):
    with pytest.raises(ValueError, match=f"^{re.escape(override)} must be {allowed}\\.$"):
        load_config([override])


@pytest.mark.parametrize(
    "key",
    [
        "data.on_bad_image", "data.on_bad_record", "recipe.odd_records", "backbone.resize",
        "recipe.resize", "recipe.lm", "recipe.prompt", "recipe.tokenize",
        "recipe.image_slot", "recipe.turn_mask", "trainer.accelerator", "trainer.precision", "trainer.strategy",
        "trainer.reduce_dtype", "trainer.activation_checkpointing", "trainer.nonfinite",
    ],
)  # fmt: skip
def test_an_unknown_name_is_named_with_its_key(key):
    with pytest.raises(ValueError, match=f"^Unknown {key} 'foo'.*Choices: "):
        load_config([f"{key}=foo"])


@pytest.mark.parametrize(("value", "near"), [("bf16-true", "bf16-mixed"), ("16-mixed", "bf16-mixed")])
def test_a_precision_that_the_training_does_not_know_is_none(value, near):
    with pytest.raises(ValueError, match=f"Did you mean '{near}'"):
        load_config([f"trainer.precision={value}"])


@pytest.mark.parametrize("name", ["../../etc", "a/b", "..", "/tmp/x", "a\\b"])
def test_a_run_stays_in_the_folder_of_runs(name):
    for override in (f"run_id={name}", *([f"recipe.name={name}"] if "/" in name else [])):
        with pytest.raises(ValueError, match="must be a single name"):
            load_config([override])


@pytest.mark.parametrize(
    "override",
    [
        "recipe.max_steps=1", "recipe.max_steps=null", "recipe.warmup_ratio=0", "recipe.warmup_ratio=1",
        "recipe.grad_clip=0", "recipe.betas=[0,0.999]", "recipe.projector_lr=null", "trainer.samples=0",
        "trainer.accelerator=cuda", "trainer.threads=null", "run_id=a..b", "recipe.tokenize=null", "seed=0",
        "backbone.image_size=${recipe.micro_batch_size}",
    ],
)  # fmt: skip
def test_what_has_a_meaning_is_allowed(override):
    load_config([override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe.resize=foo", "Unknown recipe.resize"),
        ("recipe.val_fraction=-1", "recipe.val_fraction=-1 must"),
        ("backbone.image_size=${recipe.nope}", "backbone.image_size: .*'recipe.nope' not found"),
        ("backbone.image_size=${recipe.name}", "backbone.image_size: .*Integer"),
    ],
)
def test_a_reference_is_not_blamed_for_what_it_refers_to(override, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        load_config([override])


def test_a_file_of_the_users_own_is_checked(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("lr: -1\n")
    with pytest.raises(ValueError, match="recipe.lr=-1 must be above 0"):
        load_config([f"recipe={path}"])
    path.write_text("lr: fast\n")
    with pytest.raises(ValueError, match=rf"^recipe\.lr=fast must be a number \(recipe={path}\)\.$"):
        load_config([f"recipe={path}"])


@pytest.mark.parametrize(
    ("group", "line", "near"),
    [("recipe", "learning_rate: 1e-3", "recipe.lr"), ("recipe", "epoch: 2", "recipe.epochs"),
     ("trainer", "device: 2", "trainer.devices")],
)  # fmt: skip
def test_a_slip_in_a_file_of_the_users_own_is_named(group, line, near, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=rf"Unknown key {group}\.{line.split(':')[0]} \({group}={path}\)\. .*{near}"):
        load_config([f"{group}={path}"])


def test_a_component_of_the_users_own_declares_its_options(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("width: 3\n")
    assert load_config([f"projector={path}", "projector.width=4"]).projector.width == 4
    with pytest.raises(ValueError, match="projector.width=wide must be a whole number"):
        load_config([f"projector={path}", "projector.width=wide"])


@pytest.mark.parametrize(("key", "near"), [("loss=token_meen", "token_mean"), ("sampler=group", "grouped")])
@pytest.mark.parametrize("command", [["plan"], ["sweep", "--dry-run", "seed=1,2"], ["train", "--check"]], ids=" ".join)
def test_names_of_losses_and_samplers_are_checked_before_anything_starts(command, key, near, capsys):
    assert main([*command, f"recipe.{key}"]) == 2
    assert f"Did you mean '{near}'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("group", "content", "message"),
    [
        (
            "projector",
            "{name: avgpool, mlp_dept: 3}",
            "Unknown key of the projector avgpool 'mlp_dept'. Did you mean 'mlp_",
        ),
        ("backbone", "{family: siglip, modle: mini-siglip}", "Unknown key of the backbone family siglip 'modle'"),
        ("backbone", "{family: siglip}", "The backbone family 'siglip' needs the key model"),
        ("data", "{family: llava, jsn: a.json}", "Unknown key of the data family llava 'jsn'. Did you mean 'json'"),
        ("llm", "{chat_template: x, hubb: y}", "Unknown key of an LLM 'hubb'. Did you mean 'hub'"),
        (
            "data",
            "{family: shapes, statistics: {imges: 3}}",
            "Unknown key of data.statistics 'imges'. Did you mean 'images'",
        ),
    ],
)
def test_a_slip_in_a_component_of_the_users_own_is_named(group, content, message, tmp_path, capsys):
    path = tmp_path / "own.yaml"
    path.write_text(content)
    assert main(["train", "--check", f"{group}={path}", f"runs_dir={tmp_path}"]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_plugin_may_bring_another_sampler():
    assert load_config(["recipe.sampler=mine", "plugins=[mine]"]).recipe.sampler == "mine"


def test_a_saved_run_is_read_whatever_the_rules_were(tmp_path):
    config = load_config()
    config.run_id, config.recipe.max_steps = "old/run", 0
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").run_id == "old/run"


@pytest.mark.parametrize(
    "command", [["train", "--check"], ["plan"], ["sweep", "--dry-run", "seed=1,2"], ["bench", "data"]], ids=" ".join
)
def test_commands_refuse_before_they_begin(command, capsys):
    assert main([*command, "recipe.epochs=0"]) == 2
    assert "recipe.epochs=0 must be at least 1." in " ".join(capsys.readouterr().err.split())


def test_every_sampler_of_the_schema_is_registered():
    assert set(schema.SAMPLER) == set(SAMPLERS.names())
