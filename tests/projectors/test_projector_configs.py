"""Every YAML of conf/projector against the class it configures."""

import inspect

import pytest

from prism_deco.config import choices, load_choice
from prism_deco.projectors import PROJECTORS, build_projector

COMMON = {"self", "in_dim", "out_dim", "in_grid", "num_tokens"}


def test_one_yaml_per_projector():
    shipped = [name for name in PROJECTORS.names() if PROJECTORS.get(name).__module__.startswith("prism_deco.")]
    assert choices("projector") == shipped


@pytest.mark.parametrize("name", choices("projector"))
def test_keys_and_values_are_the_arguments_and_their_defaults(name):
    content = load_choice("projector", name)
    assert content.pop("name") == name
    expected = "${recipe.num_tokens}" if PROJECTORS.get(name).compresses else None
    assert content.pop("num_tokens") == expected
    parameters = inspect.signature(PROJECTORS.get(name).__init__).parameters
    defaults = {key: parameter.default for key, parameter in parameters.items() if key not in COMMON}
    if name.endswith("_abstractor"):
        assert (content.pop("init"), defaults.pop("init")) == ("${recipe.projector_init}", "normal")
    if name == "token_packer":
        assert (content.pop("extra_layers"), defaults.pop("extra_layers")) == ("${backbone.extra_layers}", ())
    assert content == defaults


@pytest.mark.parametrize("name", choices("projector"))
def test_a_misspelt_option_is_refused(name):
    with pytest.raises(ValueError, match="Unknown key of the projector .* 'depht'"):
        build_projector(name, 8, 8, (4, 4), None, depht=2)
