"""The conversations of the miniature world: answers against slow independent readings of the scene."""

import itertools
import json
import re

import pytest
from train_tokenizers import corpus

from prism_deco.miniature.conversations import Balance, Pool, converse, records
from prism_deco.miniature.expressions import box_text
from prism_deco.miniature.questions import Question
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import COLORS, SHAPES, Scene, Thing, draw_scene
from prism_deco.miniature.templates import TEMPLATES, confusable

SCENES = [draw_scene(5, "train", index) for index in range(250)]
BY_TASK = {
    task: [(scene, q) for scene in SCENES for t in TEMPLATES if t.task == task for q in t.make(t, scene)]
    for task in {t.task for t in TEMPLATES}
}
CONVERSATIONS = [
    (scene, converse(Pool(scene), Dice(5, index), balance))
    for balance in [Balance()]
    for index, scene in enumerate(SCENES)
]


def thing(color: str, shape: str, x: int, y: int, size: int = 14) -> Thing:
    return Thing(color, shape, size, x, y, (0, 0, 0))


def middle(thing: Thing) -> tuple[float, float]:
    return thing.x + thing.size / 2, thing.y + thing.size / 2


def matching(words: str, things: tuple[Thing, ...]) -> list[Thing]:
    """The things that "small red circle" may mean; "shape" means any."""
    for word in words.split():
        tests = {"small": lambda t: t.size < 20, "large": lambda t: t.size > 20, "shape": lambda t: True}
        is_it = tests.get(word, lambda t, word=word: word in (t.color, t.shape))
        things = tuple(t for t in things if is_it(t))
    return list(things)


def referents(text: str, things: tuple[Thing, ...]) -> list[Thing]:
    """The things that an expression may mean."""
    if sentence := re.fullmatch(r"the (.+) that is (to the left of|to the right of|above|below) the (.+)", text):
        (anchor,) = matching(sentence[3], things)
        sign, axis = {"to the left of": (1, 0), "to the right of": (-1, 0), "above": (1, 1), "below": (-1, 1)}[
            sentence[2]
        ]
        return [t for t in matching(sentence[1], things) if sign * (middle(anchor)[axis] - middle(t)[axis]) > 0]
    words = text.removeprefix("the ").split()
    if words[0] in ("left", "right", "top", "bottom"):
        key = {
            "left": lambda t: middle(t)[0],
            "right": lambda t: -middle(t)[0],
            "top": lambda t: middle(t)[1],
            "bottom": lambda t: -middle(t)[1],
        }[words[0]]
        first, second, *_ = sorted(matching(" ".join(words[1:]), things), key=key)
        return [first] if key(second) - key(first) >= 8 else [first, second]
    return matching(" ".join(words), things)


@pytest.mark.parametrize("task", ["refcoco", "refcoco+", "refcocog"])
def test_expressions_mean_exactly_one_thing(task):
    assert len(BY_TASK[task]) > 500
    for scene, question in BY_TASK[task]:
        assert referents(question.text, scene.things) == [question.target]
        assert question.answer == box_text(question.target.box)


def test_flavours_of_referring_expressions():
    texts = {task: {q.text for _, q in BY_TASK[task]} for task in ("refcoco", "refcoco+", "refcocog")}
    located = re.compile(r"\b(left|right|top|bottom|above|below)\b")
    assert any(located.search(text) for text in texts["refcoco"])
    assert not any(located.search(text) for text in texts["refcoco+"])
    assert any("small" in text for text in texts["refcoco+"])
    assert all(" that is " in text and located.search(text) for text in texts["refcocog"])


def test_coordinates_are_33_distinct_numbers_of_two_decimals():
    words = [box_text((edge, edge, edge, edge))[1:5] for edge in range(0, 65, 2)]
    assert len(set(words)) == 33
    assert all(abs(float(word) - edge / 64) <= 0.00501 for word, edge in zip(words, range(0, 65, 2), strict=True))
    assert box_text((0, 10, 30, 64)) == "[0.00, 0.16, 0.47, 1.00]"


def test_counts_existence_and_attributes_are_true():
    for scene, q in BY_TASK["pope"] + BY_TASK["vqav2"] + BY_TASK["vizwiz"]:
        words = q.text.rstrip("?").split()
        if "plate" in words:
            assert q.answer == (str(scene.plate.number) if scene.plate else "unanswerable")
        elif words[0] == "Is":
            named = " ".join(word for word in words if word in COLORS + SHAPES)
            assert q.answer == ("Yes" if matching(named, scene.things) else "No")
        elif words[0] == "How":
            named = " ".join(words[2:-2]).replace("crosses", "cross").replace("s ", " ")
            named = named if named in SHAPES else named.removesuffix("s")
            assert q.answer == str(len(matching(named, scene.things)))
        else:
            found = matching(words[-1], scene.things)
            asked = "color" if words[1] == "color" else "shape"
            assert q.answer == (getattr(found[0], asked) if found else "unanswerable")
            assert len(found) < 2


def test_relations_by_hand():
    red, blue = thing("red", "circle", 0, 0, 26), thing("blue", "square", 40, 8)
    scene = Scene((red, blue), None, 90, "any")
    answers = {q.text: q.answer for t in TEMPLATES if t.task == "gqa" for q in t.make(t, scene)}
    assert answers == {
        "Is the red circle to the left of the blue square?": "Yes",
        "Is the red circle to the right of the blue square?": "No",
        "Is the blue square to the left of the red circle?": "No",
        "Is the blue square to the right of the red circle?": "Yes",
        "Is the red circle larger than the blue square?": "Yes",
        "Is the red circle smaller than the blue square?": "No",
        "Is the blue square larger than the red circle?": "No",
        "Is the blue square smaller than the red circle?": "Yes",
        "Is the red circle on the left or right side of the image?": "left",
        "Is the red circle on the top or bottom side of the image?": "top",
        "Is the blue square on the left or right side of the image?": "right",
        "Is the blue square on the top or bottom side of the image?": "top",
        "What color is the shape to the left of the blue square?": "red",
        "What color is the shape to the right of the red circle?": "blue",
    }


def test_adversarial_categories_mix_what_is_seen():
    two = Scene((thing("red", "circle", 0, 0), thing("blue", "square", 40, 8)), None, 90, "any")
    assert confusable(two) == {"red square", "blue circle"}
    one = Scene((thing("red", "circle", 0, 0),), None, 90, "any")
    assert len(confusable(one)) == 3 + 5
    assert all(("red" in category) != ("circle" in category) for category in confusable(one))


def test_turns_of_a_conversation_do_not_answer_each_other():
    for _, turns in CONVERSATIONS:
        for earlier, later in itertools.combinations(turns, 2):
            assert earlier.text != later.text
            both = {earlier.task, later.task}
            if earlier.target is not None and earlier.target == later.target:
                pytest.fail(f"{earlier.text} / {later.text}: the same box twice")
            if later.template in ("color", "maybe_color", "shape", "maybe_shape") and later.answer != "unanswerable":
                asked = later.text.rstrip("?").split()[-1]
                told = f"{later.answer} {asked}" if asked in SHAPES else f"{asked} {later.answer}"
                assert told not in f"{earlier.text} {earlier.answer}", (earlier, later)
            if both <= {"textvqa", "vizwiz"}:
                assert not ("plate" in earlier.text and "plate" in later.text)
            if later.template.startswith("count"):
                assert not earlier.template.startswith("count")


def test_length_and_mixture_of_conversations():
    talks = [turns for _, turns in CONVERSATIONS if turns[0].task != "caption"]
    assert 3.8 < sum(map(len, talks)) / len(talks) <= 5
    assert {q.task for turns in talks for q in turns} == set(BY_TASK)
    for _, turns in CONVERSATIONS:
        assert len(turns) == 1 or all(q.task != "caption" for q in turns)
        assert sum(len(f"{q.prompt} {q.answer}".split()) for q in turns) <= 160


def test_records_are_llava_records():
    named = [(f"train/{index:06d}.png", scene) for index, scene in enumerate(SCENES)]
    found = list(records(5, "train", named, per_image=2))
    assert json.loads(json.dumps(found)) == found
    assert len({record["id"] for record in found}) == len(found)
    texts = [record for record in found if "image" not in record]
    assert 0.03 < len(texts) / len(found) < 0.08
    for record in found:
        values = [turn["value"] for turn in record["conversations"]]
        speakers = [turn["from"] for turn in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2) != []
        assert values[0].startswith("<image>\n") == ("image" in record)
        assert sum(value.count("<image>") for value in values) == ("image" in record)


def test_text_only_turns_are_answered_by_their_text():
    named = [(f"train/{index:06d}.png", scene) for index, scene in enumerate(SCENES)]
    texts = [record for record in records(5, "train", named, per_image=2) if "image" not in record]
    for record in texts:
        for human, gpt in zip(record["conversations"][::2], record["conversations"][1::2], strict=True):
            story, question = re.fullmatch(r"There is (.+)\. (.+)\?\nAnswer .+", human["value"]).groups()
            told = re.findall(rf"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})", story)
            last = question.split()[-1]
            if question.startswith("What color"):
                assert [color for color, shape in told if shape == last] == [gpt["value"]]
            elif question.startswith("Which shape"):
                assert [shape for color, shape in told if color == last] == [gpt["value"]]
            else:
                kind = question.split()[2]
                kind = {"crosses": "cross"}.get(kind, kind.removesuffix("s"))
                assert sum(kind in pair or kind == "shape" for pair in told) == int(gpt["value"])


def test_prompts_are_worded_as_in_llava():
    question = Question("refcoco", "refcoco", "the red circle", "[0.00, 0.00, 0.25, 0.25]")
    region = "Please provide the bounding box coordinate of the region this sentence describes: the red circle."
    assert question.prompt == region
    question = Question("vizwiz", "maybe_plate", "What does the plate say?", "unanswerable")
    assert question.prompt == (
        "What does the plate say?\nWhen the provided information is insufficient, respond with 'Unanswerable'."
        "\nAnswer the question using a single word or phrase."
    )


def test_corpus_covers_the_words_of_all_tasks():
    texts = list(corpus(5, 300))
    assert len(texts) == 300 and texts[:9] == list(corpus(5, 9))
    words = set(re.findall(r"\d\.\d\d|\w+", " ".join(texts)))
    assert words.issuperset(COLORS + SHAPES + ("unanswerable", "Yes", "No", "caption", "plate", "larger", "region"))
    assert not any("<image>" in text for text in texts)
