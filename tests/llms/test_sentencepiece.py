"""Token ids of a `tokenizer.model` without tokenizer.json, against the sentencepiece library itself."""

import json
import random
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as spm
from transformers import AutoTokenizer

from prism_deco.llms import build_llm

CODE = "def f(x):\n    if x:\n        return x + 1\n    return None\n"
CORPUS = ["What is it? A red cat, and a blue hat.", "return x if x else y", "Is there a cat in the image?"]
WORDS = ["a", "b", "cat", "return", "Käfer", "猫", "🐞", "x+1", "USER:", "12", ",", "\n", "\t", "<u>", "\u2167"]
OPTIONS = {
    "llama": {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "other normalisation": {"normalization_rule_name": "nmt_nfkc", "add_dummy_prefix": False},
    "whole symbols": {"user_defined_symbols": ["<u>", "cat"], "remove_extra_whitespaces": False},
}


def folder_of(path: Path, kind: str, legacy: bool = False) -> Path:
    """A repository like Vicuna's: whitespace pieces of low ids and the lowest score, as in LLaMA's vocabulary."""
    path.mkdir()
    (path / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(path / "corpus.txt"), model_prefix=str(path / "tokenizer"), model_type="bpe", vocab_size=340,
        byte_fallback=True, minloglevel=2, **OPTIONS[kind],
    )  # fmt: skip
    model = spm.ModelProto.FromString((path / "tokenizer.model").read_bytes())
    learned = [piece for piece in model.pieces if piece.type == spm.ModelProto.SentencePiece.NORMAL]
    others = [piece for piece in model.pieces if piece.type != spm.ModelProto.SentencePiece.NORMAL]
    spaces = [spm.ModelProto.SentencePiece(piece="▁" * n, score=-1e9) for n in (2, 4, 8, 3, 16, 5, 6, 7)]
    for piece in learned:
        if piece.piece == "▁":
            piece.score = -1e9
    del model.pieces[:]
    model.pieces.extend([*others, *spaces, *learned])
    (path / "tokenizer.model").write_bytes(model.SerializeToString())
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = special | {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def strings(count: int) -> list[str]:
    generator = random.Random(0)
    texts = [CODE, "a  b", "\n    return", " a", "   a", " ", "  ", "", "a ", "a   "]
    for _ in range(count):
        parts = []
        for _ in range(generator.randint(1, 10)):
            parts += [generator.choice(WORDS), " " * generator.choice([0, 1, 1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 33])]
        texts.append(" " * generator.choice([0, 0, 1, 2]) + "".join(parts))
    return texts


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", OPTIONS)
def test_every_string_is_cut_as_sentencepiece_cuts_it(tmp_path, kind, legacy):
    folder = folder_of(tmp_path / "repository", kind, legacy)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    llm = build_llm("vicuna_7b_v1_5", pretrained=False, device="meta", tokenizer=str(folder))
    texts = strings(400)
    assert sum("  " in text for text in texts) > 300
    expected = [reference.encode(text) for text in texts]
    assert [llm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == expected
    # What a run saves, read by this package and by transformers alone.
    llm.tokenizer.save_pretrained(tmp_path / "run")
    again = build_llm("vicuna_7b_v1_5", pretrained=False, device="meta", tokenizer=str(tmp_path / "run")).tokenizer
    plain = AutoTokenizer.from_pretrained(tmp_path / "run")
    for tokenizer in (again, plain):
        assert [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] == expected
        assert tokenizer.decode(tokenizer("a  b")["input_ids"], skip_special_tokens=True) == reference.decode(
            reference.encode("a  b")
        )


def test_a_new_round_begins_without_a_space_of_its_own(tmp_path):
    """As LLaVA's tokenizer has it (`legacy: false`): only the text's own beginning gets the dummy prefix."""
    folder = folder_of(tmp_path / "repository", "llama")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    llm = build_llm("vicuna_7b_v1_5", pretrained=False, device="meta", tokenizer=str(folder), tokenize="whole")
    ids = llm.tokenizer("cat</s>return", add_special_tokens=False)["input_ids"]
    end = reference.eos_id()
    assert ids[: ids.index(end)] == reference.encode("cat")
    assert "".join(reference.id_to_piece(ids[ids.index(end) + 1 :])) == "return"
