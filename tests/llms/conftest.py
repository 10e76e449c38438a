"""Small tokenizers of the same types as the real ones, with their special tokens, trained during the tests."""

import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from prism_deco.config import load_choice
from prism_deco.llms import build_llm

TEXTS = [
    "A chat between a curious user and an artificial intelligence assistant. USER: What is it? ASSISTANT: A red cat.",
    "Input: Is there a cat in the image?\nOutput: Yes\nNo True False",
    "system\nYou are a helpful assistant.\nuser\nassistant\n",
    "Answer the question using a single word or phrase. [0.12, 0.34, 0.56, 0.78]",
] * 20

TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def _write(folder: Path, tokenizer: Tokenizer | None, **config) -> Path:
    folder.mkdir(exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def llama_folder(folder: Path) -> Path:
    """Like Vicuna's repository: a SentencePiece model and no tokenizer.json."""
    folder.mkdir()
    (folder / "corpus.txt").write_text("\n".join(" ".join(text.split()) for text in TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=420,
        byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        split_digits=True, minloglevel=2,
    )  # fmt: skip
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _write(folder, None, tokenizer_class="LlamaTokenizer", add_bos_token=True, **special)


def _byte_level(pre_tokenizer, special: list[str], normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    # As in the real tokenizers, special tokens come after the vocabulary.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def phi_folder(folder: Path) -> Path:
    """Like Phi-2's repository: GPT-2's byte-level BPE as CodeGenTokenizer, with one special token."""
    tokenizer = _byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"])
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return _write(folder, tokenizer, tokenizer_class="CodeGenTokenizer", add_prefix_space=False, **special)


def qwen_folder(folder: Path) -> Path:
    """Like Qwen1.5's repository: byte-level BPE with Qwen's splitting and no BOS token."""
    contractions, words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"[^\r\n\p{L}\p{N}]?\p{L}+"
    pattern = contractions + "|" + words + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _byte_level(pre_tokenizers.Sequence([split, byte_level]), special, normalizers.NFC())
    return _write(
        folder, tokenizer, tokenizer_class="Qwen2Tokenizer", bos_token=None, eos_token="<|im_end|>",
        pad_token="<|endoftext|>", unk_token=None, add_prefix_space=False,
    )  # fmt: skip


FOLDERS = {
    "vicuna_7b_v1_5": llama_folder,
    "phi2": phi_folder,
    "qwen1_5_0_5b_chat": qwen_folder,
    "smollm2_135m_instruct": qwen_folder,
}
"""Choices of real LLMs -> the builder of their tokenizer type."""


@pytest.fixture(scope="session")
def real_format(tmp_path_factory):
    """Builds a real LLM choice with a tiny architecture and tokenizer of its type; options as in `build_llm`."""
    folders = {}

    def build(choice, **options):
        if choice not in folders:
            folders[choice] = FOLDERS[choice](tmp_path_factory.mktemp("tokenizers") / choice)
        content = load_choice("llm", choice)
        content["architecture"] = content["architecture"] | TINY | {"num_key_value_heads": 2, "vocab_size": 512}
        options = {"tokenizer": str(folders[choice]), "tokenizer_size": None} | options
        return build_llm(content, pretrained=False, **options)

    return build


@pytest.fixture
def any_llm(real_format):
    """Builds any shipped LLM choice; real ones like `real_format`."""

    def build(choice, **options):
        return real_format(choice, **options) if choice in FOLDERS else build_llm(choice, **options)

    return build
