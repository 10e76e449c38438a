"""The real tokenizers, where they are at hand: set PRISM_DECO_TOKENIZERS to a folder with one folder per choice
(`phi2/tokenizer.json` ...)."""

import os
from pathlib import Path
from string import ascii_uppercase

import pytest

from prism_deco.llms import build_llm
from prism_deco.llms.encoding import IGNORE

ROOT = Path(os.environ.get("PRISM_DECO_TOKENIZERS", "."))
CHOICES = ["qwen1_5_0_5b_chat", "phi2", "vicuna_7b_v1_5", "smollm2_135m_instruct"]
SENTENCES = ["Ein Käfer 🐞, sagt USER: Output:", "[0.10, 0.25, 0.50, 1.00]"]
WORDS = ["Yes", "No", "True", "False", *ascii_uppercase]


@pytest.fixture(params=CHOICES)
def llm(request):
    folder = ROOT / request.param
    if "PRISM_DECO_TOKENIZERS" not in os.environ or not folder.is_dir():
        pytest.skip(f"PRISM_DECO_TOKENIZERS has no folder {request.param}")
    return build_llm(request.param, pretrained=False, device="meta", tokenizer=str(folder))


@pytest.mark.parametrize("answer", WORDS + SENTENCES)
def test_what_is_supervised_is_the_answer_and_the_end_token(llm, answer):
    talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
    encoded = llm.encode(talk * 2)
    ids = [label for label in encoded.labels if label != IGNORE]
    text = llm.tokenizer.decode(ids)
    end = llm.tokenizer.decode([next(i for i in llm.eos_ids if i in ids)])
    assert "".join(text.split()) == "".join(f"{answer}{end}{answer}{end}".split())
    prompt = llm.encode(talk[:1], add_generation_prompt=True)
    assert encoded.input_ids[: len(prompt.input_ids)] == prompt.input_ids


@pytest.mark.parametrize("word", WORDS)
def test_answers_that_are_compared_are_one_token_each(llm, word):
    talk = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": word}]
    encoded = llm.encode(talk)
    ids = [label for label in encoded.labels if label != IGNORE]
    assert llm.tokenizer.decode(ids[:1]).strip() == word
