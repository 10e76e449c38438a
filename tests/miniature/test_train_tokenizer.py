"""The shipped tokenizers: how they cut the miniature world's texts, and that they can be made again."""

import pytest
from train_tokenizers import INSTRUCTIONS, corpus, train_tokenizers

from prism_deco.llms import build_llm
from prism_deco.llms.hub import ASSETS

CHOICES = ["mini_qwen2", "mini_phi", "mini_llama"]
EVERYTHING = "".join(map(chr, range(256))) + "猫 né 🐈‍⬛ \U0010ffff"


@pytest.fixture(scope="module")
def llms():
    return {choice: build_llm(choice) for choice in CHOICES}


def answer_tokens(llm, text, question="What?"):
    """The tokens of an answer, without the end token and Llama's dummy space."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    ids = [label for label in llm.encode(messages).labels if label >= 0]
    assert ids.pop() in llm.eos_ids
    tokens = [llm.tokenizer.decode([token]) for token in ids]
    return [token for token in tokens if token]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_byte_can_be_told(llms, choice):
    tokenizer = llms[choice].tokenizer
    ids = tokenizer(EVERYTHING, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == EVERYTHING
    assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("choice", CHOICES)
def test_a_box_is_four_coordinates(llms, choice):
    for numerators in [(0, 1, 2, 3)] + [(k - 3, k - 2, k - 1, k) for k in range(7, 33, 4)] + [(29, 30, 31, 32)]:
        coordinates = [f"{k / 32:.2f}" for k in numerators]
        tokens = answer_tokens(llms[choice], f"[{', '.join(coordinates)}]")
        assert [token for token in tokens if token[0].isdigit()] == coordinates
        assert len(tokens) == 9


@pytest.mark.parametrize("choice", CHOICES)
def test_numbers_are_digits(llms, choice):
    assert answer_tokens(llms[choice], "4711") == ["4", "7", "1", "1"]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("answer", ["Yes", "No", "True", "False", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ", "red", "unanswerable"])
def test_short_answers_are_one_token(llms, choice, answer):
    assert answer_tokens(llms[choice], answer) == [answer]


@pytest.mark.parametrize("choice", CHOICES)
def test_first_tokens_of_answers_differ(llms, choice):
    llm = llms[choice]
    prompt = llm.encode([{"role": "user", "content": "Is it?"}], add_generation_prompt=True).input_ids
    first = set()
    for answer in ["Yes", "No", *"ABCD"]:
        messages = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
        first.add(llm.encode(messages).input_ids[len(prompt)])
    assert len(first) == 6


@pytest.mark.parametrize("choice", CHOICES)
def test_instructions_are_one_token(llms, choice):
    tokenizer = llms[choice].tokenizer
    for instruction in INSTRUCTIONS:
        ids = tokenizer(f"Why?{instruction}", add_special_tokens=False).input_ids
        assert tokenizer.decode(ids[-1:]) == instruction


@pytest.mark.parametrize("choice", CHOICES)
def test_the_miniature_world_is_short(llms, choice):
    # Fresh conversations: about 400 characters each, in at most 70 tokens.
    texts = list(corpus(seed=1, count=50))
    tokens = sum(len(llms[choice].tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert sum(map(len, texts)) / len(texts) > 350
    assert tokens / len(texts) < 70


def test_the_shipped_files_come_from_the_miniature_world(tmp_path):
    train_tokenizers(corpus(seed=0, count=500), tmp_path)
    files = sorted(path.relative_to(ASSETS) for path in ASSETS.rglob("*.json"))
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.json")) == files and len(files) == 6
    for file in files:
        assert (tmp_path / file).read_bytes() == (ASSETS / file).read_bytes(), file
