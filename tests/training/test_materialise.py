"""Weights read in pieces are those that a whole model is loaded with."""

import pytest
import torch

from prism_deco.config import load_choice
from prism_deco.llms import build_llm
from prism_deco.llms.build import weight_map
from prism_deco.training.sharding import read_weights


@pytest.mark.parametrize("rows", [-70, 0, 70])
def test_tables_with_more_or_fewer_rows_than_the_tokenizer_has_tokens(tmp_path, rows):
    """Phi-2's checkpoint has more rows than PRISM keeps, and a bias of its head; others lack the padding token's."""
    needed = load_choice("llm", "mini_phi")
    stored = dict(needed["architecture"]) | {"vocab_size": needed["architecture"]["vocab_size"] + rows}
    torch.manual_seed(3)
    kept = {"tokenizer_size": stored["vocab_size"], "pad_to_multiple_of": None}
    model = build_llm(needed | {"architecture": stored}, pretrained=False, **kept).model
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    spec = {"weights": str(tmp_path), "pretrained": True, "tokenizer_size": needed["architecture"]["vocab_size"]}
    whole = build_llm("mini_phi", pad_to_multiple_of=1, **spec)
    bare = build_llm("mini_phi", pad_to_multiple_of=1, device="meta", **spec)
    files = weight_map(bare.spec)
    assert files is not None
    read_weights(bare.model, files, torch.device("cpu"))
    expected = dict(whole.model.named_parameters())
    assert expected["lm_head.bias"].shape == (spec["tokenizer_size"],) and expected["lm_head.bias"].abs().sum() > 0
    for name, parameter in bare.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_another_shape_is_an_error(tmp_path):
    torch.manual_seed(3)
    choice = load_choice("llm", "mini_phi")
    build_llm("mini_phi", pretrained=False).model.save_pretrained(tmp_path)
    wider = choice["architecture"] | {"intermediate_size": choice["architecture"]["intermediate_size"] + 8}
    bare = build_llm(choice | {"architecture": wider}, device="meta")
    files = weight_map(build_llm("mini_phi", weights=str(tmp_path), device="meta").spec)
    assert files is not None
    with pytest.raises(ValueError, match=r"The weight model\.layers\.0\.mlp\.fc1\.weight is \[.*\] in its file and"):
        read_weights(bare.model, files, torch.device("cpu"))
