import json
from dataclasses import asdict

import pytest

from prism_deco.bootstrap import combine_strata
from prism_deco.errors import UsageError
from prism_deco.evaluation import build_benchmark, chance, load_predictions, score_file
from prism_deco.evaluation.scoring import predict, summarise

KINDS = ("pope", "refcoco", "vqav2", "vizwiz", "textvqa", "gqa", "mme", "seed", "mmbench", "questions")


def graded(benchmark, outputs):
    """Predictions of a benchmark's items, given outputs in their order."""
    return [benchmark.grade(predict(i, o)) for i, o in zip(benchmark.items(), outputs, strict=True)]


def metrics(benchmark, outputs):
    return summarise(benchmark, graded(benchmark, outputs), None)["metrics"]


def test_pope(files):
    benchmark = build_benchmark(files.pope())
    yes, no = '{"Yes": 0.9, "No": 0.1}', '{"Yes": 0.2, "No": 0.8}'
    # labels of a subset: yes yes no no
    likelihood = [yes, yes, yes, yes, yes, no, no, no]
    written = ["Yes", "No.", "No", "what?", "Yes", "Yes", "No", "There is not"]
    result = summarise(benchmark, graded(benchmark, likelihood + written), None)
    values = result["metrics"]
    assert values["accuracy/random"] == 50 and values["accuracy/popular"] == 75
    assert values["accuracy"] == 62.5
    assert values["f1/random"] == pytest.approx(200 / 3) and values["f1/popular"] == pytest.approx(200 / 3)
    assert values["yes_ratio"] == pytest.approx((100 + 25) / 2)
    assert values["precision/popular"] == 100 and values["recall/popular"] == 50
    # written, random: yes no no yes -> tp 1 fp 1 tn 1 fn 1; popular: all right
    assert values["generate/accuracy"] == 75 and values["generate/f1"] == pytest.approx((50 + 100) / 2)
    assert result["primary"] == "accuracy" and result["n"] == 8
    assert values["generate/invalid_rate"] == 1 / 8
    assert result["variants"] == ["likelihood", "generate"] and result["invalid_rate"] == values["invalid_rate"] == 0


def test_pope_ties_are_a_yes_like_argmax(files):
    benchmark = build_benchmark(files.pope(variants=["likelihood"]))
    predictions = graded(benchmark, ['{"Yes": 0.5, "No": 0.5}'] * 8)
    assert {p.answer for p in predictions} == {"yes"}


def test_an_unreadable_image_is_wrong_whatever_the_label(files):
    benchmark = build_benchmark(files.pope(variants=["generate"]))
    values = metrics(benchmark, [None] * 8)
    assert values["accuracy"] == 0 and values["f1"] == 0 and values["invalid_rate"] == 1


def test_refcoco_in_both_frames(files):
    benchmark = build_benchmark(files.refcoco(size=(100, 50)))
    # true boxes: [0, 0, .5, 1] twice, [.1, 0, .6, 1] twice; in the padded square y runs from .25 to .75
    outputs = ["[0.0, 0.0, 0.5, 1.0]", "[0.0, 0.25, 0.5, 0.75]", "box: [0.1, 0, 0.6, 1]", "[0.1, 0.25, 0.6, 0.8]"]
    values = metrics(benchmark, outputs)
    # raw IoU: 1, .5, (unreadable), .55; corrected: .5, 1, (unreadable), y from 0 to 1.1: 1/1.1
    assert values["accuracy"] == 75 and values["accuracy_pad_corrected"] == 75
    # lenient reads the third: raw 1, corrected y from -.5 to 1.5: .5
    assert values["accuracy_lenient"] == 100 and values["accuracy_lenient_pad_corrected"] == 100
    assert values["invalid_rate"] == 0.25


def test_refcoco_frames_differ_where_the_border_is_wide(files):
    benchmark = build_benchmark(files.refcoco(size=(200, 50)))
    # true boxes: [0, 0, .25, 1] and [.05, 0, .3, 1]; in the padded square y runs from .375 (75 px) to .625
    raw, padded = "[0.0, 0.0, 0.25, 1.0]", "[0.05, 0.375, 0.3, 0.625]"
    values = metrics(benchmark, [raw, raw, padded, padded])
    assert values["accuracy"] == 50 and values["accuracy_pad_corrected"] == 50
    assert [p.score for p in graded(benchmark, [raw, raw, padded, padded])] == [1, 1, 0, 0]


def test_refcoco_threshold_is_included(files):
    benchmark = build_benchmark(files.refcoco(size=(100, 50)))
    assert metrics(benchmark, ["[0, 0, 0.25, 1]"] * 4)["accuracy"] == 50  # IoU .25/.5 with [0, 0, .5, 1]


def test_refcoco_lenient_compares_with_the_exact_box(files):
    """An image of 300 x 50: the exact boxes of 50 x 50 pixels end at 1/6 and 1/5, the rounded ones at .17 and .2."""
    benchmark = build_benchmark(files.refcoco(size=(300, 50)))
    # IoU with [0, 0, 1/6, 1]: .0834 / (1/6) = .5004; with [0, 0, .17, 1]: .0834 / .17 = .4906
    values = metrics(benchmark, ["[0.0, 0.0, 0.0834, 1.0]"] * 2 + [""] * 2)
    assert values["accuracy"] == 0 and values["accuracy_lenient"] == 50
    earlier = graded(benchmark, ["[0.0, 0.0, 0.0834, 1.0]"] * 2 + [""] * 2)
    for prediction in earlier:
        prediction.target.pop("exact_box", None)  # the sentences of an expression share their target
    assert summarise(benchmark, earlier, None)["metrics"]["accuracy_lenient"] == 0


def test_vqav2_conventions_and_types(files):
    values = metrics(build_benchmark(files.vqav2()), ["zero", "1", " 3 "])
    assert values["accuracy"] == pytest.approx(200 / 3)  # "zero" becomes 0
    assert values["accuracy_official"] == pytest.approx(100 / 3)  # the annotators agree: nothing is processed
    assert values["accuracy_llava"] == pytest.approx(200 / 3)  # "zero" was processed before it was handed in
    assert "accuracy_evalai" not in values
    assert values["accuracy/number"] == 100 and values["accuracy/other"] == 0


def test_vizwiz_by_answerability(files):
    values = metrics(build_benchmark(files.vizwiz()), ["Unanswerable", ""])
    assert values["accuracy"] == 50
    assert values["accuracy/unanswerable"] == 100 and values["accuracy/answerable"] == 0
    assert values["accuracy_official"] == 50 and values["accuracy_llava"] == 50
    assert values["invalid_rate"] == 0.5


def test_textvqa_reports_both_prompts(files):
    values = metrics(build_benchmark(files.textvqa()), ["Word0", "word1", "word0", "x"])
    assert values["accuracy"] == 100 and values["plain/accuracy"] == 50
    values = metrics(build_benchmark(files.textvqa(variants=["plain", "prism"])), ["Word0", "x", "word0", "word1"])
    assert values["accuracy"] == 50 and values["prism/accuracy"] == 100


def test_gqa_conventions(files):
    values = metrics(build_benchmark(files.gqa()), ["Yes.", "yes!", "t-shirt"])
    assert values["accuracy"] == pytest.approx(200 / 3) and values["accuracy_llava"] == pytest.approx(200 / 3)


def test_own_questions(files):
    benchmark = build_benchmark(files.questions())
    assert [p.score for p in graded(benchmark, ["a cat.", "Two", "2"])] == [1, 1, 1]
    values = metrics(benchmark, ["cat", " TWO.", ""])
    assert values["accuracy"] == pytest.approx(100 / 3) and values["invalid_rate"] == pytest.approx(1 / 3)


def test_mme_sums_tasks(files):
    # count: images a (yes, no) and b (yes, no); scene: c (yes, no)
    result = summarise(
        build_benchmark(mme := files.mme()), graded(build_benchmark(mme), ["Yes", "No", "yes", "yes", "?", "no"]), None
    )
    values = result["metrics"]
    assert values["accuracy/count"] == 75 and values["accuracy_plus/count"] == 50
    assert values["accuracy/scene"] == 50 and values["accuracy_plus/scene"] == 0
    assert values["score"] == 125 + 50 and result["primary"] == "score"
    assert values["accuracy"] == pytest.approx(400 / 6) and result["invalid_rate"] == pytest.approx(1 / 6)


def test_seed_by_type(files):
    values = metrics(build_benchmark(files.seed()), ["A", "B", "b."])
    assert values["accuracy"] == pytest.approx(200 / 3) and values["accuracy_lenient"] == 100
    assert values["accuracy/Instance Location"] == 100 and values["accuracy/Spatial Relation"] == 50
    assert values["invalid_rate"] == pytest.approx(1 / 3)


def test_mmbench_counts_a_question_if_every_rotation_is_right(files):
    # question 5 and its rotation, question 6 and its rotation
    values = metrics(build_benchmark(files.mmbench()), ["A", "B", "cat", "A"])
    assert values["accuracy"] == 50 and values["accuracy_vanilla"] == 100
    assert values["accuracy/spatial_relationship"] == 100 and values["accuracy/ocr"] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "output", ["yes", "no", "A", "2", "[0.0, 0.0, 0.5, 1.0]", "", None, "\x00\ud7ff\u2028", "9" * 500]
)
def test_any_output_is_scored_and_the_interval_holds_the_primary(files, kind, output):
    keys = {"variants": ["generate"]} if kind == "pope" else {}
    benchmark = build_benchmark(getattr(files, kind)(**keys))
    predictions = graded(benchmark, [output] * len(benchmark.items()))
    result = summarise(benchmark, predictions, None)
    primary = result["metrics"][result["primary"]]
    low, high = result["interval95"]
    assert low - 1e-9 <= primary <= high + 1e-9
    first = [p for p in predictions if benchmark.variant_of(p) == benchmark.variants[0]]
    assert combine_strata(benchmark.strata(first), benchmark.combine) == pytest.approx(primary)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_needs_the_predictions_file_only(files, kind, tmp_path):
    keys = getattr(files, kind)()
    benchmark = build_benchmark(keys)
    predictions = [predict(i, '{"Yes": 1.0, "No": 0.0}' if i.choices else "A") for i in benchmark.items()]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in predictions))
    expected = summarise(benchmark, [benchmark.grade(p) for p in predictions], None)
    assert score_file(path, build_benchmark(keys | {"root": None})) == expected


def test_predictions_of_another_benchmark_are_refused(files, tmp_path):
    gqa = build_benchmark(files.gqa())
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(predict(i, "yes"))) + "\n" for i in gqa.items()))
    with pytest.raises(UsageError, match=r"cannot be scored as tiny_vizwiz: .* question 200 has no answers\)"):
        score_file(path, build_benchmark(files.vizwiz()))


@pytest.mark.parametrize("method", ["parse", "score", "metrics", "strata"])
@pytest.mark.parametrize("error", [KeyError, TypeError, AttributeError])
def test_a_bug_in_a_benchmark_keeps_its_traceback(files, tmp_path, method, error, monkeypatch):
    def faulty(*_):
        raise error("a bug")

    benchmark = build_benchmark(files.gqa())
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(predict(i, "yes"))) + "\n" for i in benchmark.items()))
    monkeypatch.setattr(benchmark, method, faulty)
    with pytest.raises(error) as caught:
        score_file(path, benchmark)
    assert str(caught.traceback[-1].path) == __file__ and caught.traceback[-1].name == "faulty"


@pytest.mark.parametrize(
    ("recorded", "variants", "says"),
    [
        (True, ["likelihood"], r"holds answers of the variant generate, not likelihood: .* variants=\[generate\]"),
        (False, ["likelihood"], r"question random/0 is text, not probabilities\. .* set variants=\[generate\]"),
        (True, ["generate"], None),
        (False, ["generate"], None),
    ],
)
def test_answers_of_another_variant(files, tmp_path, recorded, variants, says):
    asked = build_benchmark(files.pope(variants=["generate"]))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(predict(i, "Yes"))) + "\n" for i in asked.items()))
    if recorded:
        (tmp_path / "decoding.json").write_text(json.dumps({"strategy": "greedy", "variants": ["generate"]}))
    benchmark = build_benchmark(files.pope(variants=variants))
    if says:
        with pytest.raises(UsageError, match=says):
            score_file(path, benchmark)
    else:
        result = score_file(path, benchmark)
        assert result["variants"] == ["generate"] and result["metrics"]["accuracy"] == 50
        assert result["decoding"] == ({"strategy": "greedy"} if recorded else None)


def test_probabilities_are_not_read_as_text(files):
    benchmark = build_benchmark(files.pope(variants=["generate"]))
    with pytest.raises(UsageError, match=r"is probabilities, not text\. .* set variants=\[likelihood\]"):
        graded(benchmark, ['{"Yes": 0.1, "No": 0.9}'] * 8)
    assert graded(benchmark, ['{"Maybe": 0.1, "No": 0.9}'] * 8)[0].answer == "yes"


@pytest.mark.parametrize(("kind", "part"), [("pope", "popular"), ("mme", "scene")])
def test_predictions_without_one_of_the_parts(files, tmp_path, kind, part):
    benchmark = build_benchmark(getattr(files, kind)())
    kept = [predict(i, "yes") for i in benchmark.items() if part not in i.question_id]
    kept = [p for p in kept if p.target.get("variant") != "likelihood"]
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in kept))
    with pytest.raises(UsageError, match=f"no questions of {part} in the predictions"):
        score_file(path, benchmark)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no predictions"),
        ('{"question_id": "1"}\n', "line 1 is not a prediction"),
        ("[1]\n", "line 1 is not a prediction"),
        ('{"question_id": ', "line 1 is damaged"),
    ],
)
def test_damaged_prediction_files(tmp_path, content, message):
    path = tmp_path / "predictions.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_predictions(path)


def test_a_question_answered_twice(files, tmp_path):
    item = build_benchmark(files.gqa()).items()[0]
    path = tmp_path / "predictions.jsonl"
    path.write_text((json.dumps(asdict(predict(item, "yes"))) + "\n") * 2)
    with pytest.raises(ValueError, match="question 200 occurs twice"):
        load_predictions(path)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("pope", 50),  # always yes, or always no
        ("vqav2", 100 / 3),  # "0", "1" or "2"
        ("vizwiz", 50),  # "unanswerable", or "dark red"
        ("textvqa", 50),
        ("gqa", 200 / 3),  # "yes"
        ("mme", 100),  # half of each pair, never both: 50 per task
        ("seed", 200 / 3),  # "B"
        ("mmbench", 0),  # no letter survives the rotation
        ("questions", 200 / 3),  # "2"
        ("refcoco", 100),  # the mean box meets both kinds of boxes
    ],
)
def test_chance(files, kind, expected):
    benchmark = build_benchmark(getattr(files, kind)())
    assert chance(benchmark, [predict(item, None) for item in benchmark.items()]) == pytest.approx(expected)


def test_chance_is_that_of_the_questions_that_were_asked(files):
    benchmark = build_benchmark(files.gqa(limit=2))
    assert chance(benchmark, [predict(item, None) for item in benchmark.items()]) == 100  # "yes" twice


def test_chance_of_the_only_variant_that_was_asked(files):
    """The YAML's first variant is another one."""
    asked = build_benchmark(files.pope(variants=["generate"]))
    answers = [predict(item, "Yes") for item in asked.items()]
    for prediction in answers:
        prediction.target["variant"] = "generate"
    assert chance(build_benchmark(files.pope()), answers) == 50
