"""The small tokenizers of the miniature LLMs, trained on the miniature world's conversations.

They have the types of the real ones: byte-level BPE with ChatML tokens (Qwen), byte-level BPE with one
`<|endoftext|>` (Phi), and BPE with a dummy prefix space and byte fallback (Llama's SentencePiece).
All split numbers into digits, as Qwen and Llama do. A box coordinate is a single token, and so is an instruction that
all questions of a kind share. Both shorten sequences, and thereby training on a laptop.

    python runs/reference/miniature/train_tokenizers.py --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from prism_deco.miniature.conversations import records
from prism_deco.miniature.scene import draw_scene

COORDINATES = tuple(f"{k / 32:.2f}" for k in range(33))
"""The coordinates of boxes on a grid of 32 bins."""

ANSWERS = ("Yes", "No", "True", "False", *ascii_uppercase)
"""Answers that are scored by their first token: one token each, as in the real tokenizers."""

INSTRUCTIONS = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer with the option's letter from the given choices directly.",
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'.",
    "Please provide the bounding box coordinate of the region this sentence describes:",
    "Please provide a short description for this region:",
    "Provide a one-sentence caption for the provided image.",
)
"""Instructions that LLaVA's data repeats verbatim: one token each."""

_EMPHASIS = 1_000
"""How often texts that must become tokens are added to the corpus, which might not contain them."""

# Single digits, words with the space before them, and the separator of coordinates as one piece.
_BYTE_LEVEL = r"\d|, (?=\d|$)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s"
_METASPACE = r"\d|,▁(?=\d|$)|▁?\p{L}+|▁?[^▁\s\p{L}\p{N}]+|▁|\s"


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts of `count` conversations, each prompt and answer on its own line."""
    scenes = [("", draw_scene(seed, "corpus", index)) for index in range(count)]
    for _, record in zip(range(count), records(seed, "corpus", scenes, per_image=1), strict=False):
        yield "\n".join(turn["value"].removeprefix("<image>\n") for turn in record["conversations"])


def train_tokenizers(corpus: Iterable[str], folder: Path) -> None:
    """Trains the three tokenizers and writes them to `folder`/{qwen2,phi,llama}/.

    The result depends on the corpus only.

    Args:
        corpus: the texts of conversations (questions and answers).
    """
    whole = [*COORDINATES, *INSTRUCTIONS]
    # Train on lines, because tokenizers of the Llama type treat the first word of a text differently.
    lines = [line for text in corpus for line in text.split("\n")] + [*ANSWERS] * _EMPHASIS
    endoftext = "<|endoftext|>"
    frame = ["user\n", "assistant\n"] * _EMPHASIS
    qwen2 = _byte_level(lines + frame, 600, [endoftext, "<|im_start|>", "<|im_end|>"], whole)
    _save(qwen2, folder / "qwen2", eos_token="<|im_end|>")
    frame = ["Q: ", "A: "] * _EMPHASIS
    phi = _byte_level(lines + frame, 600, [endoftext], whole)
    _save(phi, folder / "phi", bos_token=endoftext, eos_token=endoftext, unk_token=endoftext)
    llama = _metaspace(lines + frame, 700, whole)
    _save(llama, folder / "llama", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _byte_level(texts: list[str], size: int, special: list[str], whole: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with at most `size` tokens, including those that are never split (`whole`)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_BYTE_LEVEL), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _train(tokenizer, texts, size, special, alphabet, whole)
    return tokenizer


def _metaspace(texts: list[str], size: int, whole: Sequence[str]) -> Tokenizer:
    """BPE with at most `size` tokens, `▁` for spaces, a dummy prefix space and byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            pre_tokenizers.Split(Regex(_METASPACE), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    special = ["<unk>", "<s>", "</s>"]
    # Tokenizers of this type list the bytes after the three special tokens.
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    _train(tokenizer, texts, size, special + bytes_, alphabet, whole)
    # The byte tokens are special only for the trainer: the literal text "<0x0A>" is ordinary text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] not in bytes_]
    return Tokenizer.from_str(json.dumps(state))


def _train(
    tokenizer: Tokenizer, texts: list[str], size: int, special: list[str], alphabet: list[str], whole: Sequence[str]
) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(whole), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in whole])


def _save(tokenizer: Tokenizer, folder: Path, **special: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the miniature tokenizers that ship with the package.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the conversations (default: %(default)s)")
    args = parser.parse_args()
    train_tokenizers(corpus(args.seed, count=500), args.out)


if __name__ == "__main__":
    main()
