"""Tokens of the three kinds of tokenizers, merged into words."""

import pytest

from prism_deco.explain.words import encode_answer, merge_words, token_texts
from prism_deco.llms import build_llm


@pytest.mark.parametrize("name", ["mini_qwen2", "mini_phi", "mini_llama"])
@pytest.mark.parametrize(
    "answer", ["a red circle, and a blue cross.", "naïve 猫 über", "[0.25, 0.5, 0.75, 1.0]", "Yes"]
)
def test_tokens_join_to_the_answer_and_words_to_its_words(name, answer):
    llm = build_llm(name, pretrained=False, device="meta")
    encoded, ids = encode_answer(llm, "What is it?", answer, 16)
    texts = token_texts(ids, llm.tokenizer)
    words = merge_words(texts)
    assert len(texts) == len(ids) and "".join(texts).strip() == answer
    assert [word.text for word in words] == answer.split()
    spaces = {k for k, text in enumerate(texts) if text and not text.strip()}
    assert {k for word in words for k in word.tokens} == set(range(len(ids))) - spaces
    for word in words:
        assert word.text in "".join(texts[k] for k in word.tokens)
    assert not set(ids) & set(llm.eos_ids) and [x for x in encoded.labels if x >= 0][: len(ids)] == ids


def test_a_token_over_two_words_counts_for_both_and_whitespace_for_none():
    assert merge_words(["a r", "ed", " ", "", "cat\n"]) == [("a", (0,)), ("red", (0, 1)), ("cat", (3, 4))]
