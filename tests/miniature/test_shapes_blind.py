"""Nobody may answer the miniature's questions without looking: the best image-blind answers, scored."""

from collections import Counter, defaultdict
from statistics import median

import pytest

from prism_deco.evaluation.metrics.boxes import iou
from prism_deco.miniature import benchmarks
from prism_deco.miniature.conversations import Balance, Pool, converse
from prism_deco.miniature.questions import Question
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import draw_scene

TRAIN, TEST = 3000, 800
BOXES = ("refcoco", "refcoco+", "refcocog")

# Measured: 51.0, 31.0, 43.6, 40.0, 0.6, 3.8, 2.0, 1.0 and 3.0; the bounds leave about two standard errors.
BOUNDS = {
    "pope": 55,
    "vqav2": 35,
    "gqa": 48,
    "vizwiz": 44,
    "textvqa": 3,
    "refcoco": 7,
    "refcoco+": 4,
    "refcocog": 4,
    "region": 6,
}


@pytest.fixture(scope="module")
def conversations() -> list[list[Question]]:
    balance = Balance()
    return [
        converse(Pool(draw_scene(0, "train", index)), Dice(0, "train", index, "questions"), balance)
        for index in range(TRAIN)
    ]


@pytest.fixture(scope="module")
def asked() -> dict[str, list[Question]]:
    split = benchmarks.Split(0, "test", [Pool(draw_scene(0, "test", index)) for index in range(TEST)], 500)
    questions = {task: [q for _, q in benchmarks.one_per_image(split, task)] for task in BOUNDS if task != "pope"}
    return questions | {"pope": [q for subset in benchmarks.pope_subsets(split).values() for _, q in subset]}


def numbers(text: str) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = (float(part) for part in text.strip("[]").split(","))
    return x1, y1, x2, y2


def guess(answers: list[str], is_box: bool) -> str:
    if is_box:
        return str([median(edge) for edge in zip(*map(numbers, answers), strict=True)])
    return Counter(answers).most_common(1)[0][0]


def blind_accuracy(train: list[Question], test: list[Question]) -> float:
    """Answers each question as its text was most often answered in training; new texts as the whole task was."""
    is_box = test[0].task in BOXES
    by_text: dict[str, list[str]] = defaultdict(list)
    for question in train:
        by_text[question.text].append(question.answer)
    fallback = guess([question.answer for question in train], is_box)
    guesses = {text: guess(answers, is_box) for text, answers in by_text.items()}
    hits = 0
    for question in test:
        answer = guesses.get(question.text, fallback)
        hits += iou(numbers(answer), numbers(question.answer)) >= 0.5 if is_box else answer == question.answer
    return 100 * hits / len(test)


@pytest.mark.parametrize("task", BOUNDS)
def test_blind_answers_stay_near_chance(task, conversations, asked):
    train = [question for turns in conversations for question in turns if question.task == task]
    accuracy = blind_accuracy(train, asked[task])
    assert accuracy <= BOUNDS[task], accuracy


def test_the_floor_notices_a_leak(conversations):
    """The measure itself: questions whose text gives the answer are all answered blind."""
    colors = [q for turns in conversations for q in turns if q.template == "color"]
    same = [q for q in colors if q.answer == "red"]
    assert blind_accuracy(same, same) == 100


@pytest.mark.parametrize(
    ("template", "chance"),
    [
        ("exists", 1 / 2),
        ("exists_confusable", 1 / 2),
        ("relation", 1 / 2),
        ("larger", 1 / 2),
        ("count", 1 / 4),
        ("color", 1 / 6),
        ("shape", 1 / 4),
        ("neighbour_color", 1 / 6),
    ],
)
def test_answers_of_a_family_are_equally_frequent(template, chance, conversations):
    answers = Counter(q.answer for turns in conversations for q in turns if q.template == template)
    total = answers.total()
    assert total > 200
    assert max(answers.values()) <= chance * total + 2.5 * (total * chance * (1 - chance)) ** 0.5


def test_two_in_five_vizwiz_questions_are_unanswerable(conversations, asked):
    for questions in ([q for turns in conversations for q in turns if q.task == "vizwiz"], asked["vizwiz"]):
        share = sum(q.answer == "unanswerable" for q in questions) / len(questions)
        assert 0.35 <= share <= 0.45


def test_mentioned_things_do_not_hint_at_yes_or_no(conversations):
    """Later in a conversation, when much has been named, yes must stay as likely as no."""
    later = Counter(q.answer for turns in conversations for q in turns[1:] if q.task == "pope")
    assert later.total() > 300
    assert abs(later["Yes"] / later.total() - 0.5) < 0.08
