import sys
from typing import Any

import pytest

from prism_deco.config.registry import Registry, import_plugins, unknown


def test_a_name_is_found_exactly_and_taken_once():
    registry: Registry[str] = Registry("colour")
    registry.register("red")("#f00")
    assert registry.get("red") == "#f00"
    assert registry.names() == ["red"]
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        registry.register("red")("#e00")


def test_an_unknown_name_lists_the_nearest_and_all():
    registry: Registry[int] = Registry("projector")
    for i, name in enumerate(["avgpool", "maxpool", "linear"]):
        registry.register(name)(i)
    with pytest.raises(ValueError) as error:
        registry.get("avgpol")
    assert "Unknown projector 'avgpol'. Did you mean 'avgpool'" in str(error.value)
    assert "Choices: avgpool, linear, maxpool." in str(error.value)
    with pytest.raises(ValueError):  # no prefix or substring matching
        registry.get("avg")


def test_a_file_in_the_package_registers_itself(tmp_path, monkeypatch):
    package = tmp_path / "fruit"
    package.mkdir()
    (package / "__init__.py").write_text(
        "from prism_deco.config.registry import Registry\nFRUIT = Registry('fruit', 'fruit')\n"
    )
    (package / "apple.py").write_text("from fruit import FRUIT\nFRUIT.register('apple')('malus')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (package / "citrus.py").write_text("from fruit import FRUIT\nFRUIT.register('lemon')('citrus limon')\n")
    import fruit  # type: ignore[import-not-found]

    assert "fruit.apple" not in sys.modules
    assert fruit.FRUIT.get("apple") == "malus"
    assert "fruit.citrus" not in sys.modules, "a module of the component's own name needs no other"
    assert fruit.FRUIT.get("lemon") == "citrus limon"
    for name in ("../apple", "apple.seed", ""):
        with pytest.raises(ValueError, match="Unknown fruit"):
            fruit.FRUIT.get(name)


def test_options_are_those_that_a_component_takes():
    registry: Registry[Any] = Registry("colour")

    @registry.register("mixed")
    def mixed(red, *, green=0, name="x"):
        return red, green, name

    assert registry.build("mixed", red=1, name="y") == (1, 0, "y")
    with pytest.raises(ValueError, match="mixed 'grean'. Did you mean 'green'. Choices: green, name."):
        registry.build("mixed", red=1, grean=2)
    with pytest.raises(ValueError, match="The colour 'mixed' needs the key red"):
        registry.build("mixed", green=2)
    registry.register("any")(lambda **options: options)
    assert registry.build("any", blue=3) == {"blue": 3}


def test_a_bug_in_a_component_is_no_wrong_option():
    registry: Registry[Any] = Registry("colour")
    registry.register("broken")(lambda red: red.missing)
    with pytest.raises(AttributeError):
        registry.build("broken", red=1)


def test_many_choices_are_not_all_listed():
    message = str(unknown("model", "ViT-X", [f"ViT-{i:03d}" for i in range(100)]))
    assert message.count("ViT-0") <= 43 and message.endswith(" and 60 more.")


def test_a_missing_plugin_says_how_to_make_it_importable():
    with pytest.raises(ValueError, match="'no_such_plugin' cannot be imported.*PYTHONPATH"):
        import_plugins(["no_such_plugin"])
