"""Multiple choice: parsing the letter of the chosen option (SEED-Bench, MMBench)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

# What may precede and follow a lone letter, in the order in which OpenCompass's script tries it.
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
    """LLaVA on SEED-Bench: the output must be the bare letter."""
    return output if output in letters else None


def parse_first_letter(output: str, letters: Collection[str]) -> str | None:
    """lmms-eval on SEED-Bench: the first character, in upper or lower case."""
    letter = output[:1].upper()
    return letter if letter in letters else None


def infer_option(output: str, options: Mapping[str, str]) -> str | None:
    """OpenCompass's script on MMBench: a lone letter, else the only option whose text the output contains.

    A bare "A" among more than three words is taken for the article. Outputs that this does not decide, the script
    passes to a language model; here they are None.

    Args:
        options: text by letter. As in the script, a letter A..E without an option is also an answer, a wrong one.
    """
    words = set(output.split())
    for before, after in (("", ""), *_FRAMES):
        found = [letter for letter in "ABCDE" if f"{before}{letter}{after}" in words]
        # Only a bare A can be the article; A with punctuation is always a letter.
        article = not before and not after and "A" in found and len(output.split()) > 3
        if len(found) == 1 and not article:
            return found[0]
    lower = output.lower()
    contained = [letter for letter, text in options.items() if text.lower() in lower]
    return contained[0] if len(contained) == 1 else None
