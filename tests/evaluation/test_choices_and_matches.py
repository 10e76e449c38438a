import pytest

from prism_deco.evaluation.metrics.choice import infer_option, parse_first_letter, parse_letter
from prism_deco.evaluation.metrics.exact import strip_all_punctuation, strip_trailing_period


@pytest.mark.parametrize(
    ("output", "strict", "first"),
    [
        ("A", "A", "A"),
        ("D", "D", "D"),
        ("a", None, "A"),
        ("E", None, None),
        ("A.", None, "A"),
        ("B. red", None, "B"),
        ("(C)", None, None),
        ("The answer is A", None, None),
        ("Dog", None, "D"),
        ("cat", None, "C"),
        ("", None, None),
        ("AB", None, "A"),
        ("1", None, None),
        ("b)", None, "B"),
        ("A B", None, "A"),
    ],
)
def test_letters(output, strict, first):
    assert parse_letter(output, tuple("ABCD")) == strict
    assert parse_first_letter(output, tuple("ABCD")) == first


OPTIONS = {"A": "cat", "B": "dog", "C": "hot dog", "D": "bird"}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("A", "A"),
        ("B.", "B"),
        ("(C)", "C"),
        ("(C).", "C"),
        ("D:", "D"),
        ("B)", "B"),
        (":D", "D"),
        ("The answer is B", "B"),
        ("A cat is here", "A"),  # "A" is an article here, but only one option's text occurs
        ("A thing is here", None),  # an article, and no option
        ("It is A", "A"),  # three words
        ("A or B", None),
        ("B. dog, not D. bird", None),  # two letters, and three options' texts
        ("cat", "A"),
        ("a CAT", "A"),
        ("hot dog", None),  # holds "dog" as well
        ("bird", "D"),
        ("fish", None),
        ("", None),
        ("E", "E"),  # an answer, though there is no such option
        ("Take B, as A. is wrong", "A"),  # the form "A." is tried before "B,"
    ],
)
def test_option_inference(output, expected):
    assert infer_option(output, OPTIONS) == expected


@pytest.mark.parametrize(
    ("output", "answer", "prism", "llava"),
    [
        ("yes", "yes", 1, 1),
        ("Yes", "yes", 1, 1),
        ("Yes.", "yes", 1, 1),
        ("yes...", "yes", 1, 1),
        ("yes!", "yes", 1, 0),
        ("yes, it is", "yes", 0, 0),
        ("t-shirt", "t-shirt", 0, 1),  # deleting all punctuation makes it "tshirt"
        ("tshirt", "t-shirt", 0, 0),
        ("parking lot", "parking lot", 1, 1),
        ("parking  lot", "parking lot", 0, 0),
        ("the left", "left", 0, 0),
        ("left.right", "leftright", 1, 0),
        ("", "yes", 0, 0),
        (".", "yes", 0, 0),
        ("No", "no", 1, 1),
        ("'no'", "no", 1, 0),
        ("$5", "5", 1, 0),
    ],
)
def test_gqa_conventions(output, answer, prism, llava):
    assert (strip_all_punctuation(output) == answer) == prism
    assert (strip_trailing_period(output) == answer) == llava
