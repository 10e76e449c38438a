import pytest

from prism_deco.evaluation.metrics.yesno import (
    mme_pairs,
    mme_score,
    parse_mme,
    parse_pope,
    says_yes_or_no,
    yes_no_rates,
)


@pytest.mark.parametrize(
    ("output", "expected", "readable"),
    [
        ("Yes", "yes", True),
        ("No", "no", True),
        ("no", "no", True),
        ("NO", "yes", True),  # only No, no and not are looked for
        ("No.", "no", True),
        ("No, there is none", "no", True),
        ("Yes, there is no doubt", "no", True),
        ("There is not", "no", True),
        ("There isn't", "yes", False),
        ("Yes. No.", "yes", True),  # the first sentence only
        (".No", "yes", True),
        ("", "yes", False),
        ("banana", "yes", False),
        ("nothing", "yes", False),
        ("no\n", "yes", True),  # words are what spaces separate
        ("I do  not know", "no", True),
        ("Nope", "yes", False),
    ],
)
def test_pope_reading(output, expected, readable):
    assert parse_pope(output) == expected
    assert says_yes_or_no(output) is readable


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("yes.", "yes"),
        ("No, it is not", "no"),
        ("oh no", None),  # "oh n"
        ("eyes", "yes"),
        ("now", "no"),
        ("know", "no"),
        ("I know", None),
        ("not yes", "no"),
        ("", None),
        ("maybe", None),
        ("a yes", None),  # "a ye"
        ("1", None),
        ("no yes", "no"),
        ("YESNO", "yes"),
    ],
)
def test_mme_reading(output, expected):
    assert parse_mme(output) == expected


@pytest.mark.parametrize(
    ("answers", "labels", "accuracy", "precision", "recall", "f1", "yes_ratio"),
    [
        # tp, fp, tn, fn by hand
        ("yyyy", "yynn", 0.5, 0.5, 1, 2 / 3, 1),  # always yes on balanced labels
        ("nnnn", "yynn", 0.5, 0, 0, 0, 0),  # always no: no precision to speak of
        ("yynn", "yynn", 1, 1, 1, 1, 0.5),
        ("nnyy", "yynn", 0, 0, 0, 0, 0.5),
        ("ynnn", "yynn", 0.75, 1, 0.5, 2 / 3, 0.25),
        ("yyyn", "yynn", 0.75, 2 / 3, 1, 0.8, 0.75),
        ("ynyn", "yynn", 0.5, 0.5, 0.5, 0.5, 0.5),
        ("y", "y", 1, 1, 1, 1, 1),
        ("y", "n", 0, 0, 0, 0, 1),
        ("n", "n", 1, 0, 0, 0, 0),
        ("n", "y", 0, 0, 0, 0, 0),
        ("yyy", "yyy", 1, 1, 1, 1, 1),
        ("yyn", "yyy", 2 / 3, 1, 2 / 3, 0.8, 2 / 3),
        ("-", "y", 0, 0, 0, 0, 0),  # no answer to a "yes" is a miss
        ("-", "n", 0, 0, 0, 0, 1),  # no answer to a "no" is a false alarm
        ("-y", "yy", 0.5, 1, 0.5, 2 / 3, 0.5),
    ],
)
def test_rates(answers, labels, accuracy, precision, recall, f1, yes_ratio):
    words = {"y": "yes", "n": "no", "-": None}
    rates = yes_no_rates([words[a] for a in answers], [words[label] for label in labels])
    expected = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1, "yes_ratio": yes_ratio}
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("correct", "images", "accuracy", "plus"),
    [
        ("11", "aa", 1, 1),
        ("10", "aa", 0.5, 0),
        ("00", "aa", 0, 0),
        ("1111", "aabb", 1, 1),
        ("1110", "aabb", 0.75, 0.5),
        ("1010", "aabb", 0.5, 0),
        ("1100", "aabb", 0.5, 0.5),
        ("1100", "abab", 0.5, 0),  # pairs are found by image, not by position
        ("1010", "abab", 0.5, 0.5),
        ("1", "a", 1, 0),  # the twin is missing
        ("111", "aab", 1, 0.5),
        ("110", "aab", 2 / 3, 0.5),
        ("011", "baa", 2 / 3, 0.5),
        ("0000", "aabb", 0, 0),
        ("111100", "aabbcc", 2 / 3, 2 / 3),
    ],
)
def test_mme_score(correct, images, accuracy, plus):
    assert mme_score([c == "1" for c in correct], list(images)) == pytest.approx((accuracy, plus))


def test_mme_pairs_keep_the_order_of_images():
    assert mme_pairs([True, False, True], ["b", "a", "b"]) == [(2, True), (0, False)]
