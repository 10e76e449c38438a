"""LLaVA's alignment prompt: the BOS token, the image, and the caption with a newline, which alone is supervised."""

import pytest
import torch

from prism_deco.llms import Segment, build_llm
from prism_deco.llms.build import weights_record

PAIR = [
    {"role": "user", "content": "Write a terse summary.\n<image>"},
    {"role": "assistant", "content": " a red cat "},
]


def test_segments(real_format):
    llm = real_format("vicuna_7b_v1_5", prompt="plain", tokenize="whole")
    expected = [
        Segment("<s>", supervised=False),
        Segment("", supervised=False, image=True),
        Segment(" a red cat \n", supervised=True, round=1),
    ]
    assert llm.render(PAIR, num_images=1) == expected
    # Nothing stands before the image, so that its place in the text is the one after BOS.
    in_place = real_format("vicuna_7b_v1_5", prompt="plain", tokenize="whole", image_slot="in_place")
    assert in_place.render(PAIR, num_images=1) == expected


def test_tokens_are_those_of_llava(real_format):
    llm = real_format("vicuna_7b_v1_5", prompt="plain", tokenize="whole")
    encoded = llm.encode(PAIR, num_images=1)
    # LLaVA tokenises "<image>" + caption + "\n" in two halves and puts its placeholder between them; by hand:
    vocabulary = llm.tokenizer.get_vocab()
    ids = llm.tokenizer("a red cat", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[0] == vocabulary["<s>"] and encoded.image_slots == [1]
    assert encoded.labels == [-100, *encoded.input_ids[1:]], "only BOS is not supervised"
    assert encoded.input_ids[-1] == vocabulary["<0x0A>"] and vocabulary["</s>"] not in encoded.input_ids
    assert llm.tokenizer.decode(encoded.input_ids[1:]).strip() == "a red cat"
    tight = llm.encode([PAIR[0], {"role": "assistant", "content": "a red cat"}], num_images=1)
    assert tight.input_ids == [vocabulary["<s>"], *ids, vocabulary["<0x0A>"]]


@pytest.mark.parametrize("choice", ["mini_qwen2", "mini_phi", "mini_llama"])
def test_every_template_gives_way(choice):
    llm = build_llm(choice, device="meta", prompt="plain")
    texts = [s.text for s in llm.render(PAIR, num_images=1)]
    assert texts == [llm.spec.special_tokens["bos_token"], "", " a red cat \n"]


def test_an_unknown_prompt_lists_the_known_ones():
    with pytest.raises(ValueError, match="Unknown recipe.prompt 'plane'.*Did you mean 'plain'.*chat, plain"):
        build_llm("mini_llama", device="meta", prompt="plane").render(PAIR)


def test_a_base_that_is_named_by_its_source_is_the_same_whenever_it_is_loaded(tmp_path):
    torch.manual_seed(0)
    build_llm("mini_llama", pretrained=False).model.save_pretrained(tmp_path / "weights")

    def load(seed):
        torch.manual_seed(seed)
        # More rows than the weights have: they are drawn.
        return build_llm("mini_llama", pretrained=True, weights=str(tmp_path / "weights"), tokenizer_size=760)

    first, again = load(1), load(2)
    assert first.embedding_rows == 768
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name
    rows = first.model.get_output_embeddings().weight[704:]
    assert rows.std() > 0
    record = weights_record(first.spec)
    assert record["name"] == "mini_llama" and record["path"] == str(tmp_path / "weights")
    file = tmp_path / "weights" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_record(first.spec)["sha256"] != record["sha256"]
