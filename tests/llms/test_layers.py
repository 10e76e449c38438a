"""The layers of an LLM are found whatever its architecture calls them."""

import pytest
from torch import nn

from prism_deco.config import choices
from prism_deco.llms import build_llm
from prism_deco.llms.layers import decoder_layers


@pytest.mark.parametrize("name", choices("llm"))
def test_they_are_the_units_that_transformers_names(name):
    lm = build_llm(name, device="meta").model
    layers = decoder_layers(lm)
    assert len(layers) == lm.config.num_hidden_layers
    assert list(layers) == [module for module in lm.modules() if type(module).__name__ in lm._no_split_modules]


def test_a_model_without_layers_is_refused():
    lm = nn.Module()
    lm.config = build_llm("mini_qwen2", device="meta").model.config
    with pytest.raises(ValueError, match="Module has no list of . decoder layers"):
        decoder_layers(lm)
