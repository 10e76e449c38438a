"""Multiple choice: which letter an output means (SEED-Bench, MMBench)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# What may stand before and after a lone letter, in the order in which OpenCompass's script tries it.
_FRAMES = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)


def parse_letter(output: str, letters: Collection[str]) -> str | None:
    """LLaVA on SEED-Bench: the output is the letter and nothing else."""
    return output if output in letters else None


def parse_first_letter(output: str, letters: Collection[str]) -> str | None:
    """lmms-eval on SEED-Bench: the first character, in either case."""
    letter = output[:1].upper()
    return letter if letter in letters else None


def infer_option(output: str, options: Mapping[str, str]) -> str | None:
    """OpenCompass's script on MMBench: a lone letter, else the only option whose text the output contains.

    A bare "A" among more than three words is taken for the article. What this leaves open, the script
    passes to a language model; here it stays None.

    Args:
        options: text by letter. A letter A..E without an option is an answer too (a wrong one), as in the script.
    """
    words = set(output.split())
    for before, after in (("", ""), *_FRAMES):
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        article = not before and not after and "A" in found and len(output.split()) > 3
        if len(found) == 1 and not article:
            return found[0]
    lower = output.lower()
    contained = [letter for letter, text in options.items() if text.lower() in lower]
    return contained[0] if len(contained) == 1 else None
