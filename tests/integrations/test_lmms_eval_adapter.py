"""A run inside lmms-eval: its plugin mechanism, its requests, and a whole evaluation of a task on disk."""

import json
from importlib.metadata import entry_points

import pytest
from PIL import Image

import prism_deco.integrations
from prism_deco.api import Model, load
from prism_deco.cli import main

pytest.importorskip("lmms_eval", reason="lmms-eval is an extra: pip install prism-deco[lmms-eval]")

from lmms_eval import evaluator, models
from lmms_eval.api.instance import Instance
from lmms_eval.models.registry_v2 import ModelRegistryV2

from prism_deco.integrations import lmms_eval as adapter

COLORS = ("red", "green", "blue", "yellow", "gray")
GREEDY = {"max_new_tokens": 4, "temperature": 0, "do_sample": False, "until": ["\n\n"]}


@pytest.fixture
def model(tiny):
    vlm, llm = tiny()
    return Model(vlm.eval(), llm, config=None)


@pytest.fixture
def adapted(model, monkeypatch):
    """batch size -> the adapter around a tiny random model, with five records of one task."""
    monkeypatch.setattr(adapter, "load", lambda run, device, dtype, plugins: model)

    def build(**options):
        made = adapter.PrismDeco.create_from_arg_string("run=runs/x", {"device": "cpu", **options})
        made.task_dict["colors"] = {"test": [{"color": color} for color in COLORS]}
        return made

    return build


def image_of(record):
    return [Image.new("RGB", (32, 32), record["color"])]


def requests(kind, rows, to_images=image_of):
    """(record, context, settings or answer) -> lmms-eval's requests, as its tasks make them."""
    metadata = {"task": "colors", "repeats": 1}
    return [
        Instance(kind, (context, more, to_images, record, "colors", "test"), k, metadata | {"doc_id": record})
        for k, (record, context, more) in enumerate(rows)
    ]


def test_the_entry_point_leads_to_the_adapter():
    registry = ModelRegistryV2()
    registry.register_manifest(prism_deco.integrations.lmms_eval_manifest())
    assert registry.get_model_class("prism_deco") is adapter.PrismDeco
    found = entry_points(group="lmms_eval.models").select(name="prism_deco")
    if not found:
        pytest.skip("this checkout is on the path, but not installed")
    assert [entry.load() for entry in found] == [prism_deco.integrations.lmms_eval_manifest]
    assert models.get_model("prism_deco") is adapter.PrismDeco


@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_answers_come_back_in_order(adapted, model, batch_size):
    """Two limits, questions of several lengths, a record without an image."""
    rows = [(k, "What color " * (1 + k % 3) + f"is it, {k}?", GREEDY | {"max_new_tokens": 3 + k % 2}) for k in range(5)]
    expected = [
        model.generate([image_of({"color": COLORS[k]})[0]], [context], max_new_tokens=settings["max_new_tokens"])[0]
        for k, context, settings in rows
    ]
    assert adapted(batch_size=batch_size).generate_until(requests("generate_until", rows)) == expected
    assert len(set(expected)) > 1
    text_only = adapted().generate_until(requests("generate_until", rows[:1], to_images=lambda record: []))
    assert text_only == model.generate([None], [rows[0][1]], max_new_tokens=3)


def test_a_record_with_several_images(adapted, model):
    pairs = [(k, "Which is larger?", {"max_new_tokens": 3}) for k in range(2)]
    two = lambda record: [image_of(record)[0], image_of({"color": "white"})[0]]  # noqa: E731
    expected = model.generate([two({"color": COLORS[k]}) for k in range(2)], ["Which is larger?"] * 2, max_new_tokens=3)
    assert adapted(batch_size=2).generate_until(requests("generate_until", pairs, two)) == expected


def test_answers_end_before_a_stop_string(adapted, model, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda images, prompts, max_new_tokens: ["a b\n\nc d"] * len(prompts))
    rows = [(0, "?", {"until": until}) for until in (["\n\n"], "b", ["d", "c"], [], None)]
    answers = adapted(batch_size=5).generate_until(requests("generate_until", rows))
    assert answers == ["a b", "a ", "a b\n\n", "a b\n\nc d", "a b\n\nc d"]


def test_losses_of_choices(adapted, model, monkeypatch):
    """The choices of one record share its image; the answer may be made from the record."""
    encoded = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda images: encoded.append(len(images)) or encode(images))
    rows = [(record, "What color is it?", f" {color}") for record in (0, 1) for color in COLORS[:3]]
    rows.append((2, "What color is it?", lambda record: record["color"]))
    scores = adapted(batch_size=6).loglikelihood(requests("loglikelihood", rows))
    assert [count for count in encoded if count] == [2, 1]
    for (record, question, answer), (score, greedy) in zip(rows, scores, strict=True):
        text = answer.strip() if isinstance(answer, str) else COLORS[record]
        image = image_of({"color": COLORS[record]})[0]
        [alone], _ = model.answer_losses([image], [question], [text])
        assert score == pytest.approx(float(alone), rel=1e-6) and score > 0 and greedy is False


@pytest.mark.parametrize(
    ("settings", "to_images", "message"),
    [
        ({"temperature": 0.7}, image_of, "answers greedily"),
        ({"num_beams": 5}, image_of, "answers greedily"),
        ({}, lambda record: ["video.mp4"], "found str"),
    ],
)
def test_what_a_run_cannot_do(adapted, settings, to_images, message):
    with pytest.raises(ValueError, match=message):
        adapted().generate_until(requests("generate_until", [(0, "?", settings)], to_images))


@pytest.mark.parametrize(("option", "value"), [("batch_size", "auto"), ("batch_size", 0), ("dtype", "int8")])
def test_wrong_settings(adapted, option, value):
    with pytest.raises(ValueError, match=option):
        adapted(**{option: value})


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task on disk, in the two forms that tasks score a question: a number, or a record with it."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n"
        "def images(doc):\n    return [Image.new('RGB', (32, 32), doc['color'])]\n"
        "def question(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n"
        "def score(doc, results):\n"
        "    right = results[0] == doc['answer']\n"
        "    return {'right': float(right), 'recorded': {'answer': doc['answer'], 'is_correct': right}}\n"
        "def mean(scores):\n    return sum(scores) / len(scores)\n"
        "def recorded(entries):\n    return sum(entry['is_correct'] for entry in entries) / len(entries)\n"
    )
    (tmp_path / "colors.yaml").write_text(
        f"task: colors\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'colors.json'}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.images\ndoc_to_text: !function utils.question\ndoc_to_target: answer\n"
        "process_results: !function utils.score\ngeneration_kwargs: {max_new_tokens: 4, temperature: 0}\n"
        "metric_list:\n  - {metric: recorded, aggregation: !function utils.recorded, higher_is_better: true}\n"
        "  - {metric: right, aggregation: !function utils.mean, higher_is_better: true}\n"
    )

    def write(model):
        """Five records, four of which the model answers rightly."""
        records = [{"color": color, "question": f"Is it {color}?", "answer": "x"} for color in COLORS]
        questions = [record["question"] for record in records]
        truth = model.generate([image_of(record)[0] for record in records], questions, max_new_tokens=4)
        for record, answer in zip(records[:4], truth, strict=False):
            record["answer"] = answer
        (tmp_path / "colors.json").write_text(json.dumps(records))
        return tmp_path / "colors.yaml", truth

    return write


def test_a_whole_evaluation(adapted, model, task):
    """lmms-eval reads a task from its YAML and a data set from disk, asks, and scores."""
    path, _ = task(model)
    from lmms_eval.tasks import TaskManager

    results = evaluator.simple_evaluate(
        model=adapted(batch_size=2),
        tasks=["colors"],
        task_manager=TaskManager(include_path=str(path.parent), include_defaults=False),
        bootstrap_iters=0,
    )
    assert results["results"]["colors"]["right,none"] == pytest.approx(0.8)


def test_the_command_writes_results_for_the_report(colors, task, tmp_path, capsys):
    data = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", "data.val_fraction=0"]
    steps = ["recipe.max_steps=1", "recipe.global_batch_size=2", "recipe.micro_batch_size=2", "data.num_workers=0"]
    start = ["train", "data=llava", *data, *steps, "backbone.pretrained=false", "evaluate.benchmarks=null"]
    assert main([*start, f"runs_dir={tmp_path}", "run_id=run"]) == 0
    run = tmp_path / "run"
    path, truth = task(load(run))
    assert main(["evaluate", str(run), "--lmms-eval", str(path), "batch_size=2"]) == 0
    assert "recorded" in capsys.readouterr().out
    metrics = json.loads((run / "eval" / "colors" / "metrics.json").read_text())
    assert metrics["primary"] == "recorded" and metrics["n"] == 5
    assert metrics["metrics"]["recorded"] == pytest.approx(80) == metrics["metrics"]["right"]
    lines = (run / "eval" / "colors" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["output"] for line in lines] == truth
    assert [json.loads(line)["score"] for line in lines] == [1, 1, 1, 1, 0]
    assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
    assert "80.0" in (tmp_path / "report" / "report.md").read_text()
    assert main(["evaluate", str(run), "--lmms-eval", f"{path},ocrbenhc"]) == 2
    assert "Did you mean 'ocrbench'" in capsys.readouterr().err
