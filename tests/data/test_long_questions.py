"""A first question that leaves its answer no room: shortened, or without anything to learn as in the references."""

import pytest

from prism_deco.build import build_encoder, group, prompt_options
from prism_deco.config import load_config
from prism_deco.data.llava_json import Record
from prism_deco.errors import UsageError
from prism_deco.llms import build_llm

LONG = [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    ("recipe", "learns"), [("mini", True), ("prism", False), ("deco", False), ("llava_v1_5_finetune", False)]
)
def test_what_is_learnt_from_it(recipe, learns):
    config = load_config([f"recipe={recipe}", "llm=mini_phi", "recipe.max_text_tokens=20"])
    encoder = build_encoder(config, build_llm(group(config, "llm"), **prompt_options(config)), 0)
    encoded, cut = encoder(Record("a", (), LONG))
    assert len(encoded.input_ids) == 20 and cut > 20
    assert any(label != -100 for label in encoded.labels) == learns


def test_a_record_that_never_had_anything_to_learn_is_still_refused():
    config = load_config(["recipe=prism", "llm=mini_phi", "recipe.prompt=plain"])
    encoder = build_encoder(config, build_llm(group(config, "llm"), **prompt_options(config)), 0)
    encoded = encoder.encode(Record("a", (), LONG))
    with pytest.raises(UsageError, match="No token is supervised"):
        encoder.fit(type(encoded)(encoded.input_ids, [-100] * len(encoded.labels), encoded.rounds, []))
