"""VQA accuracy: agreement with ten annotators, averaged over leaving each of them out.

The conventions differ in how they process texts before comparing them. Each takes the raw prediction and the raw
answers of the annotators, and returns a score in 0..1. The processing reproduces the quirks of the original scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

VQAScore = Callable[[str, Sequence[str]], float]

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The scripts write `(?!<=\d)` where they mean the look-behind `(?<!\d)`. As written, it asserts that "<=" and a digit
# do not follow, which is always true before a period: only the second condition has an effect.
_PERIOD = re.compile(r"\.(?!\d)")
# They pass `re.UNICODE` as `count`, so that only this many periods are removed.
_MAX_PERIODS = int(re.UNICODE)

# Words that get their apostrophe back if it is missing.
_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't
it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's
they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
""".split()  # noqa: SIM905 - a hundred quoted words would be harder to read
# Words with two apostrophes, either of which they get back if it is missing.
_TWO_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've
there'd've they'd've we'd've who'd've wouldn't've you'd've y'all'll
""".split()  # noqa: SIM905
# VizWiz's table has typographic apostrophes except in these entries.
_VIZWIZ_KEPT = frozenset(("ain't", "aren't", "can't", "could've", "couldn't", "we've", "where's", "who've"))


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE}
    for word in _TWO_APOSTROPHES:
        first, second, third = word.split("'")
        table |= {f"{first}{second}'{third}": word, f"{first}'{second}{third}": word}
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table["somebody'd"] = "somebodyd"  # reversed in all of the scripts' tables
    # Their keys with a capital ("Im", "Ive") are omitted: they never match, since words are lower-cased first.
    return table


CONTRACTIONS: Mapping[str, str] = _contractions()


def _vizwiz_contractions(apostrophe: str) -> dict[str, str]:
    table = {key.replace("'", apostrophe): word.replace("'", apostrophe) for key, word in CONTRACTIONS.items()}
    table |= {word.replace("'", ""): word for word in _VIZWIZ_KEPT}
    for key in ("couldn'tve", "hadn'tve"):  # in these two, only the value has the other apostrophe
        table[key] = table.pop(key.replace("'", apostrophe))
    return table


_VIZWIZ_CONTRACTIONS: Mapping[str, str] = _vizwiz_contractions("\u2019")
# The PRISM harness's copy has backticks instead. They are punctuation, so that keys with one never match.
_PRISM_VIZWIZ_CONTRACTIONS: Mapping[str, str] = _vizwiz_contractions("`")


def strip_punctuation(text: str) -> str:
    """Deletes each punctuation mark that is next to a space anywhere in `text`, replaces the others by a space, and
    deletes periods that no digit follows. If there is a comma between digits, all marks are deleted."""
    glued = _DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in _PUNCTUATION:
        delete = glued or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def normalise_words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower-cases, writes none..ten as digits, drops articles, restores apostrophes."""
    words = (_DIGITS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def flatten(text: str) -> str:
    """Replaces newlines and tabs by spaces, and strips the text."""
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def process(text: str) -> str:
    """The official VQA script's processing of an answer."""
    return normalise_words(strip_punctuation(flatten(text)))


@lru_cache(maxsize=1 << 16)
def process_evalai(text: str) -> str:
    """The EvalAI server's processing of an answer (MMF's `EvalAIAnswerProcessor`)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise_words(strip_punctuation(flatten(text)))


@lru_cache(maxsize=1 << 16)
def process_vizwiz(text: str) -> str:
    """VizWiz's own script's processing of a prediction."""
    return normalise_words(strip_punctuation(flatten(text)), _VIZWIZ_CONTRACTIONS)


@lru_cache(maxsize=1 << 16)
def process_prism_vizwiz(text: str) -> str:
    """The PRISM harness's processing of a VizWiz prediction."""
    return normalise_words(strip_punctuation(flatten(text)), _PRISM_VIZWIZ_CONTRACTIONS)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, exact matches among the others / 3).

    With ten annotators, 1, 2, 3 and 4 matches give 0.3, 0.6, 0.9 and 1.
    """
    matches = sum(answer == prediction for answer in answers)
    # Leaving out an annotator who gave this answer leaves one match fewer.
    left_out = (matches - (answer == prediction) for answer in answers)
    return sum(min(1.0, others / 3) for others in left_out) / len(answers)


def official(prediction: str, answers: Sequence[str]) -> float:
    """The VQA challenge's script: nothing is processed if all annotators gave the same answer."""
    prediction, answers = flatten(prediction), [flatten(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = process(prediction), [process(answer) for answer in answers]
    return agreement(prediction, answers)


def evalai(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's evaluator (MMF's `TextVQAAccuracyEvaluator`): both sides always processed, as on the EvalAI server."""
    return agreement(process_evalai(prediction), [process_evalai(answer) for answer in answers])


def llava(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's result on VQAv2's test server (its `scripts/convert_vqav2_for_submission.py`): EvalAI's processor
    rewrites the prediction, and only that, before it is submitted; the server then runs the official script on it.

    So if all annotators gave the same answer, and EvalAI's processor changes it, it cannot be matched: "Coca Cola"
    scores 0 against ten times "Coca Cola".
    """
    return official(process_evalai(prediction), answers)


def prism_vqav2(prediction: str, answers: Sequence[str]) -> float:
    """The PRISM harness on VQAv2: always strips punctuation from the annotators' answers, but changes nothing else."""
    return agreement(process(prediction), [strip_punctuation(answer) for answer in answers])


def vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's own script: the prediction is always processed, the annotators' answers never."""
    return agreement(process_vizwiz(prediction), answers)


def vizwiz_llava(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's result on VizWiz's test server (its `scripts/convert_vizwiz_for_submission.py`): EvalAI's processor
    rewrites the prediction before it is submitted; VizWiz's script then processes it again."""
    return vizwiz(process_evalai(prediction), answers)


def prism_vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """The PRISM harness on VizWiz: VizWiz's script, except for the apostrophes of its contraction table."""
    return agreement(process_prism_vizwiz(prediction), answers)
