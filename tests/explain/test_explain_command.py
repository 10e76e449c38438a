"""`prism-deco explain`: what it refuses, and where it writes."""

import json
import shutil

import pytest
import yaml

from prism_deco.api import Model
from prism_deco.cli import main
from prism_deco.config import load_config, save_config
from prism_deco.report.collect import read_cell


@pytest.fixture
def run(tmp_path, small, monkeypatch):
    """The folder of a finished run whose model is a small one."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    save_config(load_config([]), folder / "model/config.yaml")
    save_config(load_config([]), folder / "config.yaml")
    (folder / "manifest.json").write_text(json.dumps({"benchmarks": str(tmp_path)}))
    vlm, llm = small()
    monkeypatch.setattr("prism_deco.api.load", lambda *_, **__: Model(vlm.float(), llm, load_config([])))
    monkeypatch.setattr("prism_deco.explain.run.MAX_NEW_TOKENS", 3)  # every token takes a backward pass
    return folder


@pytest.fixture
def choice(tmp_path, colors):
    """The YAML of a benchmark of one question, in two splits."""
    for split in ("val", "test"):
        (tmp_path / f"{split}.json").write_text(
            json.dumps({"1": {"imageId": "red90", "question": "What color is it?", "answer": "red"}})
        )
    (tmp_path / "images").symlink_to(colors / "images")
    keys = {"family": "gqa", "root": None, "annotations": "{split}.json", "image": "images/{imageId}.png"}
    path = tmp_path / "one.yaml"
    path.write_text(yaml.safe_dump(keys | {"split": "val", "variants": ["short"]}))
    return f"benchmark={path}"


def test_every_measurement_has_a_folder_of_its_own(run, choice, colors):
    image = ["--image", str(colors / "images/red90.png"), "--prompt", "What color is it?", "--answer", "red"]
    for arguments in ([choice], [choice, "split=test"], image):
        assert main(["explain", str(run), *arguments]) == 0
    assert sorted(path.name for path in (run / "explain").iterdir()) == ["images", "one", "one-test"]
    splits = [json.loads((run / "explain" / n / "metrics.json").read_text())["split"] for n in ("one", "one-test")]
    (explained,) = (run / "explain/images").iterdir()
    assert splits == ["val", "test"] and (explained / "index.html").is_file()
    assert main(["explain", str(run), choice, "--out", str(run / "mine")]) == 0
    assert (run / "mine/metrics.json").is_file()


def test_files_of_a_benchmark_are_found_where_training_found_them(run, choice, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("val.json", "images"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    assert main(["explain", str(run), choice]) == 2
    stored = [f"benchmark.one.root={tmp_path / 'elsewhere'}", "benchmark.one.limit=0"]
    save_config(load_config(stored), run / "config.yaml")
    assert main(["explain", str(run), choice]) == 0


def test_another_question_or_comparison_replaces_nothing(run, colors, capsys):
    other = run.parent / "other"
    shutil.copytree(run, other)
    for prompt in ("What color is it?", "Is it red?"):
        image = ["--image", str(colors / "images/red90.png"), "--prompt", prompt, "--answer", "red"]
        assert main(["explain", str(run), str(other), *image]) == 0
    said = capsys.readouterr().out
    for folder in (run, other):
        pages = [path / "index.html" for path in (folder / "explain/images").iterdir()]
        assert len(pages) == 2 and all(str(page) in said for page in pages) and f"{folder.name}: red" in said
    assert len(list(run.parent.glob("explain-red90-*-run-vs-other.html"))) == 2


def test_two_runs_of_one_name_do_not_share_a_folder(run, colors, capsys):
    other = run.parent / "more" / "run"
    shutil.copytree(run, other)
    image = ["--image", str(colors / "images/red90.png"), "--prompt", "What color is it?", "--answer", "red"]
    assert main(["explain", str(run), str(other), *image, "--out", str(run.parent / "out")]) == 2
    assert "Two runs are named run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--image", "i.png", "benchmark=mini_gqa"], "--image concern one image, benchmark= a benchmark"),
        (["--prompt", "?", "--answer", "", "benchmark=mini_gqa"], "--prompt, --answer concern one image"),
        (["--image", "i.png", "--prompt", "?", "limit=3"], "--image, --prompt concern one image, limit= a benchmark"),
        (["--image", "i.png"], "either one question or a benchmark"),
        (["limit=3"], "either one question or a benchmark"),
        (
            ["--image", "i.png", "--prompt", "?"],
            "i.png cannot be read (No such file or directory): name an image, JPEG",
        ),
        (["benchmark=table3"], "Name one"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(run, capsys, arguments, says):
    assert main(["explain", str(run), *arguments]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_second_image_is_refused(run, capsys):
    with pytest.raises(SystemExit) as done:
        main(["explain", str(run), "--image", "a.png", "--image", "b.png", "--prompt", "?"])
    assert done.value.code == 2
    assert "--image is given twice: relevance maps explain one image." in " ".join(capsys.readouterr().err.split())


def test_reports_read_the_measurement_that_the_configuration_names(tmp_path):
    manifest = {"data_hash": "d", "params": {}, "samples": 1, "steps": 1, "tokens": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))

    def measured(place, **content):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        (tmp_path / place / "metrics.json").write_text(json.dumps({"at": place, **content}))

    def read(*settings):
        save_config(load_config(settings), tmp_path / "config.yaml")
        return read_cell(tmp_path).relevance.get("at")

    named, test = "evaluate.relevance=mini_refcoco", "evaluate.split=test"
    assert read(named) is None
    measured("explain/mini_refcocog", split="val")
    assert read(named) is None and read() == "explain/mini_refcocog"
    measured("explain/mini_refcoco", split="val")
    assert read(named) == read(named, "evaluate.split=val") == "explain/mini_refcoco"
    assert read() is read(named, test) is None
    measured("explain/mini_refcoco-test", split="test")
    assert read(named, test) == "explain/mini_refcoco-test" and read(named) == "explain/mini_refcoco"
