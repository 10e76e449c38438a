import sys

import pytest

from prism_deco.config.registry import Registry, import_plugins


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
    import fruit  # type: ignore[import-not-found]

    assert "fruit.apple" not in sys.modules
    assert fruit.FRUIT.get("apple") == "malus"


def test_a_missing_plugin_says_how_to_make_it_importable():
    with pytest.raises(ValueError, match="'no_such_plugin' cannot be imported.*PYTHONPATH"):
        import_plugins(["no_such_plugin"])
