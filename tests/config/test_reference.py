"""The reference of keys: complete, and the page in conf/ is the schema's."""

import re
from dataclasses import fields, is_dataclass

from prism_deco.cli import main
from prism_deco.config import CONF_DIR, GROUPS, choices, load_config, parse_value
from prism_deco.config.reference import reference
from prism_deco.config.schema import Config, RecipeConfig
from prism_deco.config.values import type_text


def test_the_page_in_conf_is_generated(capsys):
    assert main(["keys", "--markdown"]) == 0
    assert (CONF_DIR / "README.md").read_text() == capsys.readouterr().out, (
        "prism-deco keys --markdown > conf/README.md"
    )


def test_every_key_has_a_meaning_that_ends_as_a_sentence():
    config = Config()
    names = []
    for group in fields(Config):
        value = getattr(config, group.name)
        names += [f"{group.name}.{f.name}" for f in fields(value)] if is_dataclass(value) else [group.name]
    assert list(reference()) == names
    for key in reference().values():
        assert re.fullmatch(r"[A-Z].*[.]", key.meaning), (key.name, key.meaning)
        assert "None" not in key.meaning, "a user writes null"


def test_defaults_are_those_of_the_schema():
    defaults = RecipeConfig()
    for name in ("lr", "epochs", "betas", "max_steps", "loss", "blind", "max_logits"):
        value = parse_value(f"recipe.{name}", reference()[f"recipe.{name}"].default)
        assert (tuple(value) if isinstance(value, list) else value) == getattr(defaults, name)
    assert reference()["recipe.name"].default == ""
    assert reference()["backbone.resize"].default == "${recipe.resize}"


def test_types_are_said_in_words():
    said = {
        kind: type_text(kind) for kind in ("int", "int | None", "float", "str | None", "list[str]", "dict[str, Any]")
    }
    assert said == {
        "int": "a whole number", "int | None": "a whole number or null", "float": "a number",
        "str | None": "text or null", "list[str]": "a list of names such as [a, b]",
        "dict[str, Any]": "a mapping such as {key: value}",
    }  # fmt: skip
    assert type_text(int | None) == "a whole number or null"
    assert reference()["recipe.betas"].takes == "two numbers such as [0.9, 0.95], at least 0 and below 1"
    assert reference()["recipe.tokenize"].takes == "per_turn | whole | null"


def test_every_choice_is_described():
    page = (CONF_DIR / "README.md").read_text()
    for group in (*GROUPS, "benchmark", "sweep"):
        for choice in choices(group):
            row = next(line for line in page.splitlines() if line.startswith(f"| [`{choice}`]({group}/"))
            assert len(row.split(" | ")[1].split()) >= 3, row
            assert (CONF_DIR / group / f"{choice}.yaml").is_file()
    for key in reference():
        assert f"| `{key}` |" in page
    assert load_config().recipe.name == "mini"
