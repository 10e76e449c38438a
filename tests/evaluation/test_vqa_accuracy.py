import pytest

from prism_deco.evaluation.metrics import vqa
from prism_deco.evaluation.metrics.vqa import (
    process,
    process_evalai,
    process_prism_vizwiz,
    process_vizwiz,
    strip_punctuation,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("", ""),
        ("The Red Car", "red car"),
        ("a", ""),
        ("an apple", "apple"),
        ("none", "0"),
        ("Ten", "10"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("What?", "what"),
        ("dog's", "dog 's"),
        ("let's go", "let 's go"),
        ("dont know", "don't know"),
        ("y'allll", "y'all'll"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("im", "im"),  # the table has "Im", which lower-cased words never meet
        ("U.S.A.", "usa"),
        ("3.14", "3.14"),
        ("3.5.", "3.5"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("well-known", "well known"),
        ("well-known - yes", "wellknown yes"),  # one mark beside a space makes all of its kind go
        ("yes!\nsure\tthing", "yes sure thing"),
        ("12:30", "12:30"),  # a colon is no punctuation here
        ("." * 40, "." * 8),  # only 32 periods are ever removed
    ],
)
def test_evalai_processing(text, expected):
    assert process_evalai(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("YES", "yes"),
        ("1,000", "1000"),
        ("1,000 red-blue", "1000 redblue"),  # a comma between digits makes every mark go
        ("1, 000 red-blue", "1 000 red blue"),
        ("red,blue", "red blue"),
        ("red, blue", "red blue"),
        ("dog's", "dog's"),
        ("What?", "what"),
        ("Dont", "don't"),
        ("hes", "he's"),
        ("twas", "'twas"),
        ("'ow'sat", "'ow's'at"),
        ("None", "0"),
        ("the two of them", "2 of them"),
        ("$5.00", "$5.00"),
        ("a.m.", "am"),
        (" \n ", ""),
    ],
)
def test_official_processing(text, expected):
    assert process(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Unanswerable", "unanswerable"),
        ("dont", "don`t"),
        ("cant", "can't"),
        ("whove", "who've"),
        ("twas", "`twas"),
        ("couldn'tve", "couldn`t`ve"),
        ("couldnt've", "couldnt've"),
        ("somebody'd", "somebody'd"),
        ("dog's", "dog's"),
        ("The one", "1"),
        ("isnt it", "isn`t it"),
        ("aint", "ain't"),  # among the few that kept their apostrophe
        ("I don't know!", "i don't know"),
        ("coca-cola", "coca cola"),
        ("10,000 dollars", "10000 dollars"),
        ("2.5 oz.", "2.5 oz"),
        ("A bottle of the wine", "bottle of wine"),
        ("None", "0"),
    ],
)
def test_vizwiz_processing(text, expected):
    assert process_prism_vizwiz(text) == expected
    if "'" not in text:  # VizWiz's own table has another apostrophe, and nothing else
        assert process_vizwiz(text) == expected.replace("`", "\u2019")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("couldnt\u2019ve", "couldn\u2019t\u2019ve"),
        ("couldn\u2019tve", "couldn\u2019tve"),  # its key has the plain apostrophe
        ("couldn'tve", "couldn\u2019t\u2019ve"),
        ("hadn'tve", "hadn\u2019t\u2019ve"),
        ("mightn\u2019tve", "mightn\u2019t\u2019ve"),
        ("somebody\u2019d", "somebodyd"),
        ("it\u2019s", "it\u2019s"),
        ("it`s", "it s"),
    ],
)
def test_vizwiz_own_processing(text, expected):
    assert process_vizwiz(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "llava"),
    [
        # VizWiz's script processes the prediction even where all annotators agree, and never their answers.
        ("Coca-Cola", ["coca-cola"] * 6 + ["coke"] * 4, 0, 0),
        ("Coca Cola", ["coca cola"] * 6 + ["coke"] * 4, 1, 1),
        ("Unanswerable", ["unanswerable"] * 10, 1, 1),
        ("the dog", ["the dog"] * 10, 0, 0),
        ("The dog.", ["dog"] * 3 + ["cat"] * 7, 0.9, 0.9),
        ("two", ["2"] * 2 + ["two"] * 8, 0.6, 0.6),
        ("dont know", ["don\u2019t know"] * 10, 1, 0),  # EvalAI's processor has made "don't know" of it
        ("dont know", ["don't know"] * 10, 0, 1),
        ("cant read", ["can't read"] * 10, 1, 1),
        ("man's", ["man's"] * 10, 1, 0),  # EvalAI's processor makes "man 's" of it
        ("1,000", ["1000"] * 10, 1, 1),
    ],
)
def test_vizwiz_conventions(prediction, answers, official, llava):
    assert vqa.vizwiz(prediction, answers) == pytest.approx(official)
    assert vqa.vizwiz_llava(prediction, answers) == pytest.approx(llava)


def test_stripping_punctuation_keeps_case_and_words():
    assert strip_punctuation("The U.S. flag (red)") == "The US flag red "  # ")" has no space beside it


@pytest.mark.parametrize(
    ("matches", "annotators", "score"),
    [
        *((matches, 10, score) for matches, score in enumerate([0.0, 0.3, 0.6, 0.9, *[1.0] * 7])),
        (1, 1, 0.0),  # nobody is left to agree
        (2, 2, 1 / 3),
        (1, 2, 1 / 6),
        (3, 3, 2 / 3),
        (3, 5, (3 * 2 / 3 + 2) / 5),
    ],
)
def test_agreement_leaves_each_annotator_out(matches, annotators, score):
    answers = ["x"] * matches + [f"other {k}" for k in range(annotators - matches)]
    assert vqa.agreement("x", answers) == pytest.approx(score)


@pytest.mark.parametrize(
    ("prediction", "answers", "official", "evalai", "llava", "prism_vqav2", "prism_vizwiz"),
    [
        # all ten the same: the official script processes nothing
        ("yes", ["yes"] * 10, 1, 1, 1, 1, 1),
        ("Yes", ["yes"] * 10, 0, 1, 1, 1, 1),
        ("yes", ["Yes"] * 10, 0, 1, 0, 0, 0),
        ("two", ["2"] * 10, 0, 1, 1, 1, 1),
        ("two", ["two"] * 10, 1, 1, 0, 0, 0),  # the harness turns the prediction into 2, not the answers
        ("2", ["two"] * 10, 0, 1, 0, 0, 0),
        ("the dog", ["the dog"] * 10, 1, 1, 0, 0, 0),
        ("red/blue", ["red/blue"] * 10, 1, 1, 0, 1, 0),
        ("dont know", ["don't know"] * 10, 0, 1, 1, 1, 0),  # VizWiz's table says don`t
        ("dog's", ["dog's"] * 10, 1, 1, 0, 1, 1),
        ("", ["yes"] * 10, 0, 0, 0, 0, 0),
        ("none", ["0"] * 10, 0, 1, 1, 1, 1),
        # one differs: the official script processes both sides
        ("Yes", ["Yes"] * 9 + ["no"], 1, 1, 1, 0, 0),
        ("NO", ["yes"] * 9 + ["no"], 0.3, 0.3, 0.3, 0.3, 0.3),
        ("1,000", ["1000"] * 3 + ["many"] * 7, 0.9, 0.9, 0.9, 0.9, 0.9),
        ("a cat", ["cat"] * 2 + ["dog"] * 8, 0.6, 0.6, 0.6, 0.6, 0.6),
        ("two", ["2", "two", "Two"] + ["3"] * 7, 0.9, 0.9, 0.9, 0.3, 0.3),
        ("cat.", ["cat."] * 2 + ["cat"] * 2 + ["dog"] * 6, 1, 1, 1, 1, 0.6),
        (" yes\n", ["yes", "yes "] + ["no"] * 8, 0.6, 0.6, 0.6, 0.3, 0.3),
        ("dog's", ["dog 's"] * 4 + ["dog"] * 6, 0, 1, 1, 0, 0),
        # LLaVA hands in what EvalAI's processor makes of the prediction: lower case, and a space before 's
        ("Coca Cola", ["Coca Cola"] * 10, 1, 1, 0, 0, 0),
        ("man's", ["man's"] * 10, 1, 1, 0, 1, 1),
        ("Men's", ["men's"] * 9 + ["shoes"], 1, 1, 0, 1, 1),
    ],
)
def test_conventions(prediction, answers, official, evalai, llava, prism_vqav2, prism_vizwiz):
    assert vqa.official(prediction, answers) == pytest.approx(official)
    assert vqa.evalai(prediction, answers) == pytest.approx(evalai)
    assert vqa.llava(prediction, answers) == pytest.approx(llava)
    assert vqa.prism_vqav2(prediction, answers) == pytest.approx(prism_vqav2)
    assert vqa.prism_vizwiz(prediction, answers) == pytest.approx(prism_vizwiz)
