"""`prism-deco evaluate` on a real run, alone and under torchrun."""

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context as HParams

from prism_deco.cli import main
from prism_deco.commands.scoring import blind_scores
from prism_deco.commands.train import _scoring
from prism_deco.config import load_config, read_config, save_config
from prism_deco.distributed import World
from prism_deco.evaluation import BENCHMARKS, build_benchmark, resolve
from prism_deco.evaluation.scoring import predict
from prism_deco.files import read_json
from prism_deco.report import baselines
from prism_deco.training.board import Board

FAST = ["data.val_fraction=0", "data.num_workers=0", "recipe.max_steps=2", "recipe.global_batch_size=2",
        "recipe.micro_batch_size=2", "trainer.threads=1", "backbone.pretrained=false",
        "evaluate.benchmarks=null"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(colors, tmp_path_factory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    assert main(["train", "data=llava", *source, *FAST, f"runs_dir={runs}", "run_id=run"]) == 0
    return runs / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A trained run of the test's own."""
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def short_answers(monkeypatch):
    """Of the answers whose maps are measured: every token of them takes a backward pass."""
    monkeypatch.setattr("prism_deco.explain.run.MAX_NEW_TOKENS", 3)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(run, files, tmp_path):
    """A benchmark of the user's own, half precision included in what is recorded."""
    mine = _yaml(files.vqav2(), tmp_path / "mine")
    arguments = [f"benchmark={mine}", "max_new_tokens=4", "--dtype=bfloat16"]
    assert main(["evaluate", str(run), *arguments]) == 0
    alone = {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()}
    assert set(alone) == {"decoding.json", "metrics.json", "predictions.jsonl"}
    decoding = json.loads(alone["metrics.json"])["decoding"]
    assert (decoding["dtype"], decoding["max_new_tokens"]) == ("bfloat16", 4)
    (run / "eval").rename(tmp_path / "alone")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "prism_deco.cli", "evaluate", str(run), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in (run / "eval/mine").iterdir()} == alone
    assert done.stdout.count("accuracy (short)") == 1, "one of the processes prints"
    assert done.stderr.count("questions, 0 of 3 answers already there") == 1


@pytest.mark.slow
def test_another_precision_is_not_mixed_in_but_has_a_folder_of_its_own(run, files, tmp_path, capsys):
    arguments = ["evaluate", str(run), f"benchmark={_yaml(files.gqa(), tmp_path / 'mine')}", "max_new_tokens=4"]
    assert main(arguments) == 0
    assert main([*arguments, "--dtype=bfloat16"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"{run}/eval/mine holds answers of other settings: dtype was float32 and is bfloat16." in said
    assert main([*arguments, "--dtype=bfloat16", f"--out={tmp_path / 'low'}"]) == 0
    assert json.loads((tmp_path / "low/mine/metrics.json").read_text())["decoding"]["dtype"] == "bfloat16"


def test_each_way_to_ask_has_results_of_its_own(colors, files, tmp_path, capsys):
    """Scored after training and by the command: the same answers, with how they were asked beside the scores."""
    mine = _yaml(files.pope() | {"variants": ["likelihood"]}, tmp_path / "mine")
    deco = ["recipe.prompt_set=deco", "recipe.image_slot=after_first_token", "llm=mini_qwen2", "trainer.samples=0"]
    source = ["data=llava", f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}"]
    asks = "as_trained,deco_no_header,deco_bare_header"
    settings = [*FAST, *deco, f"evaluate.benchmarks={mine}", f"evaluate.ask={asks}", f"runs_dir={tmp_path}"]
    assert main(["train", *source, *settings, "run_id=run"]) == 0
    assert "accuracy (likelihood, deco_bare_header)" in " ".join(capsys.readouterr().out.split())
    found = {}
    for name in ("mine", "mine-deco_no_header", "mine-deco_bare_header"):
        folder = tmp_path / "run/eval" / name
        found[name] = json.loads((folder / "metrics.json").read_text())["decoding"].get("ask")
    assert found == {"mine": None, "mine-deco_no_header": "deco_no_header", "mine-deco_bare_header": "deco_bare_header"}
    outputs = {name: (tmp_path / "run/eval" / name / "predictions.jsonl").read_text() for name in found}
    assert len(set(outputs.values())) == 3
    again = ["evaluate", str(tmp_path / "run"), f"benchmark={mine}", "ask=deco_no_header", f"--out={tmp_path / 'out'}"]
    assert main(again) == 0
    assert (tmp_path / "out/mine-deco_no_header/predictions.jsonl").read_text() == outputs["mine-deco_no_header"]
    shutil.copytree(tmp_path / "out/mine-deco_no_header", tmp_path / "out/mine")
    capsys.readouterr()
    assert main([part.replace("ask=deco_no_header", "ask=as_trained") for part in again]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "holds answers of other settings: ask was deco_no_header and is as_trained" in said
    assert main([part.replace("ask=deco_no_header", "ask=deco") for part in again]) == 2
    assert "Unknown way to ask mini_qwen2 'deco'" in " ".join(capsys.readouterr().err.split())


def _yaml(keys, path) -> Path:
    file = path.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({k: v for k, v in keys.items() if k != "name"}))
    return file


@pytest.fixture
def finished(tmp_path) -> Path:
    """A run's folder as far as it is looked at before its weights are."""
    folder = tmp_path / "finished"
    (folder / "model").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"benchmarks": None, "model_sha256": "0"}))
    save_config(load_config([]), folder / "model/config.yaml")
    save_config(load_config([]), folder / "config.yaml")
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Loading one is a failure: what is wrong must have been found before."""
    monkeypatch.setattr("prism_deco.api.load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("command", ["evaluate", "explain"])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["limt=3"], "Unknown key 'limt'. Did you mean 'limit' or"),
        (["benchmarks=mini_vqav2"], "Unknown key 'benchmarks'. Did you mean 'benchmark'?"),
        (["benchmark.gqa.root=/nowhere"], "Unknown benchmark, among those that are asked for, 'gqa'"),
        (["benchmark.mine.rot=/nowhere"], "Unknown key of the benchmark mine 'rot'. Did you mean 'root'?"),
        (["benchmark.mine.root=/nowhere"], "mine, split 'val': /nowhere/instances.json does not exist"),
        (["benchmark.mine=/nowhere"], "write benchmark.NAME.KEY=VALUE"),
        (["root=5"], "mine, split 'val': 5/instances.json does not exist"),
        (["limit=x"], "mine: limit=x must be a whole number"),
        (["variants=quted"], "Unknown variant of mine 'quted'. Did you mean 'quoted'"),
        (["plugins=not_a_module"], "The plug-in module 'not_a_module' cannot be imported"),
        (["benchmark=nothing"], "Unknown benchmark 'nothing'"),
        (["benchmark=mini_gqa"], "mini_gqa needs a folder with its files"),
        (["benchmark=mini_gqa", "root=/nowhere"], "mini_gqa, split 'val': /nowhere/benchmarks/val/gqa"),
        (["--device=cuda"], "device cuda: this machine has no GPU"),
        (["--device=foo"], "'foo' is not a device"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(finished, files, no_model, capsys, command, wrong, says):
    mine = _yaml(files.refcoco(), finished / "mine")
    assert main([command, str(finished), f"benchmark={mine}", *wrong]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_a_slip_in_the_name_of_the_key_scores_nothing(finished, no_model, capsys, command):
    assert main([command, str(finished), "benchmarks=mini_vqav2"]) == 2
    assert "Unknown key 'benchmarks'. Did you mean 'benchmark'?" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate"],
        ["evaluate", "RUN"],
        ["evaluate", "RUN", "benchmark.gqa.root=x"],
        ["evaluate", "--score-only", "x"],
        ["explain"],
        ["explain", "RUN", "--image=x.png", "--prompt=?"],
    ],
)
def test_an_unknown_key_is_named_before_anything_else(finished, no_model, capsys, arguments):
    """Where no benchmark is named, by the run either."""
    save_config(load_config(["evaluate.benchmarks=null"]), finished / "config.yaml")
    assert main([str(finished) if text == "RUN" else text for text in arguments] + ["benchmarks=mini_vqav2"]) == 2
    assert "Unknown key 'benchmarks'. Did you mean 'benchmark'?" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("command", ["evaluate", "explain"])
def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    finished, files, no_model, capsys, command, tmp_path
):
    """A run of somebody else's, read by an ordinary user."""
    mine = _yaml(files.refcoco(), tmp_path / "mine")
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(0o755)
    os.seteuid(65534)
    try:
        assert main([command, str(finished), f"benchmark={mine}"]) == 2
    finally:
        os.seteuid(0)
    said = " ".join(capsys.readouterr().err.split())
    assert "cannot be written (Permission denied). Name a folder for the results with --out." in said
    assert not (finished / "eval").exists()


PLUGIN = """
from prism_deco.evaluation import BENCHMARKS
from prism_deco.evaluation.gqa import GQA

@BENCHMARKS.register("{name}")
class Mine(GQA):
    pass
"""


SLOW = """
import time
from prism_deco.evaluation.predictions import PredictionStore
append = PredictionStore.append
def slow(store, predictions):
    append(store, predictions)
    time.sleep(0.3)
PredictionStore.append = slow
"""


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_to_the_same_files(run, files, tmp_path):
    mine = _yaml(files.pope(), tmp_path / "mine")
    (tmp_path / "slow.py").write_text(SLOW)
    arguments = ["evaluate", str(run), f"benchmark={mine}", "max_new_tokens=4", "batch_size=2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "prism_deco.cli", *arguments]
    results = run / "eval/mine"
    killed = subprocess.Popen([*command, "plugins=[slow]"], env=environment)
    deadline = time.monotonic() + 200
    while sum(path.read_text().count("\n") for path in results.glob("predictions*.jsonl")) < 4:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    answered = sum(path.read_text().count("\n") for path in results.glob("predictions*.jsonl"))
    assert 4 <= answered < 16 and not (results / "metrics.json").exists()
    subprocess.run(command, env=environment, check=True)
    went_on = {path.name: path.read_bytes() for path in results.iterdir()}
    shutil.rmtree(results)
    subprocess.run(command, env=environment, check=True)
    assert {path.name: path.read_bytes() for path in results.iterdir()} == went_on
    assert went_on["predictions.jsonl"].count(b"\n") == 16


def test_a_plug_in_that_the_run_was_trained_without(run, files, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_benchmark.py").write_text(PLUGIN.format(name="plugged_in"))
    monkeypatch.syspath_prepend(tmp_path)
    BENCHMARKS.names()  # what is imported while the copy stands would be lost with it
    monkeypatch.setattr(BENCHMARKS, "_entries", dict(BENCHMARKS._entries))  # other tests do not have it
    mine = _yaml(files.gqa(family="plugged_in"), tmp_path / "mine")
    arguments = ["evaluate", str(run), f"benchmark={mine}", "benchmark.mine.limit=2", "max_new_tokens=4"]
    assert main(arguments) == 2
    assert "Unknown benchmark family 'plugged_in'" in capsys.readouterr().err
    assert main([*arguments, "plugins=my_benchmark"]) == 0
    assert json.loads((run / "eval/mine/metrics.json").read_text())["n"] == 2
    score_only = ["evaluate", "--score-only", str(run / "eval/mine/predictions.jsonl")]
    assert main([*score_only, f"benchmark={mine}", "plugins=[my_benchmark]"]) == 0
    # Or its own YAML names the module.
    BENCHMARKS._entries.pop("plugged_in")
    sys.modules.pop("my_benchmark")
    mine.write_text(f"plugins: [my_benchmark]\n{mine.read_text()}")
    assert main(arguments) == 0


def test_scores_are_shown_in_tensorboard(colors, files, tmp_path):
    """Beside the choices of the run as well, and once: the same scoring again adds no point."""
    first, second = _yaml(files.gqa(), tmp_path / "first"), _yaml(files.refcoco(), tmp_path / "second")
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    asked = [f"evaluate.benchmarks={first}", "benchmark.first.max_new_tokens=4", "run_id=run"]
    assert main(["train", "data=llava", *source, *FAST, *asked]) == 0
    run = tmp_path / "run"
    for _ in range(2):
        assert main(["evaluate", str(run), f"benchmark={first},{second}", "max_new_tokens=4"]) == 0
    assert main(["evaluate", str(run), f"benchmark={first}", "limit=1", f"--out={tmp_path / 'out'}"]) == 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("first", "second"):
        score = json.loads((run / f"eval/{name}/metrics.json").read_text())["metrics"]["accuracy"]
        [point] = events.Scalars(f"eval/{name}")
        assert (point.step, point.value) == (2, pytest.approx(score))
    (tmp_path / "another").mkdir()
    other = Board(tmp_path / "another", 0)  # trained without benchmarks, and the first by its name
    other.log_hyperparams({"seed": 1})
    other.finalize("success")
    assert {"eval/first", "eval/second"} <= _metrics_of_the_hparams_tab(tmp_path)


def _metrics_of_the_hparams_tab(folder):
    runs = EventMultiplexer()
    runs.AddRunsFromDirectory(str(folder))
    runs.Reload()
    tab = HParams(TBContext(data_provider=MultiplexerDataProvider(runs, str(folder))))
    found = tab.hparams_metadata(RequestContext(), "")
    experiment = tab.experiment_from_metadata(RequestContext(), "", True, found, [])
    return {metric.name.tag for metric in experiment.metric_infos}


def test_training_takes_the_keys_of_single_benchmarks(colors, files, tmp_path, capsys):
    keys = files.gqa()
    elsewhere = files.path.rename(tmp_path / "elsewhere")
    mine = _yaml(keys, tmp_path / "mine")
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    asked = ["train", "data=llava", *source, *FAST, f"evaluate.benchmarks={mine}", "run_id=scored"]
    assert main([*asked, "--check"]) == 2
    assert main([*asked, "--check", "benchmark.mini_gqa.root=x"]) == 2
    assert main([*asked, "--check", "benchmark.mine.root=5"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "evaluate.benchmarks: mine, split '':" in said and "'mini_gqa'. Choices: mine." in said
    assert "split '': 5/gqa.json does not exist" in said
    own = [f"benchmark.mine.root={elsewhere}", "benchmark.mine.max_new_tokens=3", "benchmark.mine.limit=1"]
    assert main([*asked, *own]) == 0
    metrics = json.loads((tmp_path / "scored/eval/mine/metrics.json").read_text())
    assert (metrics["n"], metrics["decoding"]["max_new_tokens"]) == (1, 3)
    assert main([*asked, *own, "benchmark.mine.limit=2"]) == 0, "it says nothing about what was trained"
    scored = ["evaluate", str(tmp_path / "scored"), f"--out={tmp_path / 'again'}"]
    again = tmp_path / "again/mine/metrics.json"
    assert main(scored) == 0, "where the files lie is what the run was trained with"
    assert json.loads(again.read_text())["decoding"]["max_new_tokens"] == 3
    shutil.rmtree(again.parent)
    assert main([*scored, f"benchmark={mine}", "limit=3", "benchmark.mine.max_new_tokens=2"]) == 0
    metrics = json.loads(again.read_text())
    assert (metrics["n"], metrics["decoding"]["max_new_tokens"]) == (3, 2)
    assert main([*scored, "root=/nowhere"]) == 2


def test_how_questions_are_asked_is_chosen_for_training_and_afterwards(run, colors, files, tmp_path):
    mine = _yaml(files.textvqa(variants=["ocr", "plain"]), tmp_path / "mine")
    group = tmp_path / "group.yaml"
    group.write_text(yaml.safe_dump({"members": [str(mine)], "keys": {"mine": {"variants": ["prism", "plain"]}}}))
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    train = ["train", "data=llava", *source, *FAST, "run_id=run", "benchmark.mine.max_new_tokens=3"]

    def asked(folder: Path) -> list[str]:
        return json.loads((folder / "mine/metrics.json").read_text())["variants"]

    assert main([*train, f"evaluate.benchmarks={group}"]) == 0
    assert asked(run / "eval") == ["prism", "plain"]
    assert main(["evaluate", str(run), f"--out={tmp_path / 'a'}"]) == 0
    assert asked(tmp_path / "a") == ["prism", "plain"]
    assert main(["evaluate", str(run), "benchmark.mine.variants=[plain]", f"--out={tmp_path / 'b'}"]) == 0
    assert asked(tmp_path / "b") == ["plain"]
    shutil.rmtree(run / "eval/mine")
    assert main([*train, f"evaluate.benchmarks={group}", "benchmark.mine.variants=[prism]"]) == 0
    assert asked(run / "eval") == ["prism"]


def test_own_questions_need_no_plug_in(run, files):
    files.questions()
    assert main(["evaluate", str(run), "benchmark=questions", f"root={files.path}", "max_new_tokens=4"]) == 0
    written = (run / "eval/questions/predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in written] == ["1", "2", "sum"]


def test_a_sweep_hands_them_on(capsys):
    own = ["benchmark.textvqa.root=/data/textvqa", "benchmark.textvqa.variants=[prism,plain]"]
    assert main(["sweep", "seed=1,2", "evaluate.benchmarks=textvqa", *own, "--dry-run"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if " train " in line]
    assert len(lines) == 2
    for line in lines:
        keys = _scoring(load_config(shlex.split(line.partition(" train ")[2]))).own["textvqa"]
        assert keys["root"] == "/data/textvqa"
        assert build_benchmark("textvqa", **keys).variants == ("prism", "plain")


@pytest.mark.parametrize("benchmark", ["mini_gqa", "mini"])
def test_training_on_own_data_says_how_the_default_benchmarks_find_their_files(colors, tmp_path, capsys, benchmark):
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    assert main(["train", "data=llava", *source, *FAST, f"evaluate.benchmarks={benchmark}", "--check"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    first = resolve(benchmark)[0]
    assert f"evaluate.benchmarks: {first} needs a folder with its files, and the training data come with none" in said
    assert f"benchmark.{first}.root=FOLDER" in said and "evaluate.benchmarks=null" in said


def test_a_conversation_has_the_device_that_was_asked_for(finished, monkeypatch, capsys):
    monkeypatch.setattr("prism_deco.api.load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["chat", str(finished), "--device=cuda"]) == 2
    assert "device cuda: this machine has no GPU" in " ".join(capsys.readouterr().err.split())


def test_no_benchmark_is_scored_before_the_last_one_s_files_are_read(finished, files, no_model, capsys):
    mine = _yaml(files.refcoco(), finished / "mine")
    assert main(["evaluate", str(finished), f"benchmark={mine},mini_gqa"]) == 2
    assert main(["evaluate", str(finished), f"benchmark={mine}", "batch_size=many"]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "mini_gqa needs a folder with its files" in said and "batch_size=many must be a whole number" in said


@pytest.mark.parametrize("command", ["evaluate", "explain"])
@pytest.mark.parametrize(("kept", "says"), [("backbone.json", "an export, not a run folder"), ("x", "no finished run")])
def test_what_is_no_run_is_told_before_it_is_loaded(tmp_path, no_model, capsys, command, kept, says):
    (tmp_path / kept).touch()
    assert main([command, str(tmp_path), "benchmark=mini_gqa"]) == 2
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(("folder", "split"), [("mini_gqa", "val"), ("mini_gqa-test", "test"), (None, None)])
def test_a_predictions_file_is_scored_beside_chance_and_blindness(finished, files, tmp_path, capsys, folder, split):
    """The blind score is the recorded one of the settings and the split that the file belongs to."""
    [recorded] = read_json(baselines.REFERENCE).values()
    blind = f"{recorded['scores'][split]['mini_gqa']:.1f}" if split else "-"
    benchmark = build_benchmark(files.gqa())
    place = finished / "eval" / folder if folder else tmp_path / "elsewhere"
    place.mkdir(parents=True)
    path = place / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(predict(i, "no"))) + "\n" for i in benchmark.items()))
    assert main(["evaluate", "--score-only", str(path), "benchmark=mini_gqa"]) == 0
    cells = capsys.readouterr().out.split()
    assert cells[-8:] == ["3", "0.0", "0.0", "to", "0.0", "66.7", blind, "0.0%"]  # "yes" is right twice


@pytest.mark.parametrize("kind", ["pope", "refcoco"])
def test_a_copied_predictions_file_does_not_say_its_variant(files, tmp_path, capsys, kind):
    """Its YAML's variants are no evidence, be they several or one."""
    asked = build_benchmark(getattr(files, kind)(variants=["generate" if kind == "pope" else "trained"]))
    path = tmp_path / "predictions.jsonl"
    path.write_text("".join(json.dumps(asdict(predict(i, "Yes"))) + "\n" for i in asked.items()))
    command = ["evaluate", "--score-only", str(path), f"benchmark={_yaml(getattr(files, kind)(), tmp_path / kind)}"]
    assert main(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    names = " or ".join(asked.VARIANTS)
    assert f"{path} does not say which variant" in said and f"variants=[{names}]" in said
    assert main([*command, f"variants={asked.variants[0]}"]) == 0
    assert main([*command, f"benchmark.{kind}.variants=[{asked.variants[0]}]"]) == 0
    assert f"({asked.variants[0]})" in capsys.readouterr().out


def test_a_predictions_file_takes_nothing_else(tmp_path, capsys):
    given = ["evaluate", "--score-only", "x", "runs/x", f"--out={tmp_path}", "--device=cpu", "benchmark=mini_gqa"]
    assert main(given) == 2
    assert "leave out --out, --device, a run." in " ".join(capsys.readouterr().err.split())


def test_what_training_ends_with_reaches_the_ranks():
    config = load_config(["evaluate.benchmarks=mini_pope", "benchmark.mini_pope.limit=3", "evaluate.relevance=null"])
    scoring = _scoring(config)
    assert scoring is not None and pickle.loads(pickle.dumps(scoring)) == scoring
    assert scoring.own == {"mini_pope": {"limit": 3}}


@pytest.mark.usefixtures("short_answers")
def test_training_ends_with_the_relevance_maps_of_a_benchmark(colors, files, tmp_path):
    boxes = _yaml(files.refcoco(), tmp_path / "boxes")
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    asked = [f"evaluate.relevance={boxes}", "evaluate.relevance_limit=3", "run_id=measured"]
    assert main(["train", "data=llava", *source, *FAST, *asked]) == 0
    folder = tmp_path / "measured/explain/boxes"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["n"], metrics["benchmark"], metrics["split"]) == (3, "boxes", "val")
    assert len((folder / "examples.jsonl").read_text().splitlines()) == 3
    assert not (tmp_path / "measured/eval").exists(), "no benchmark was to be scored"
    shutil.rmtree(folder)
    _scoring(read_config(tmp_path / "measured/config.yaml"))(tmp_path / "measured", World(rank=1, size=2))
    assert not folder.exists(), "the first process alone measures"


@pytest.mark.usefixtures("short_answers")
def test_a_run_that_is_done_is_scored_on_what_is_newly_asked(run, colors, files, tmp_path, monkeypatch, caplog):
    first, second = _yaml(files.gqa(), tmp_path / "first"), _yaml(files.refcoco(), tmp_path / "second")
    source = [f"data.json={colors / 'train.json'}", f"data.image_root={colors / 'images'}", f"runs_dir={tmp_path}"]
    again = ["train", "data=llava", *source, *FAST, "run_id=run"]
    weights, trained = run / "model/model.safetensors", read_config(run / "config.yaml")
    before = weights.stat().st_mtime_ns
    assert main([*again, f"evaluate.benchmarks={first}"]) == 0
    done = (run / "eval/first/decoding.json").stat().st_mtime_ns
    both = [*again, f"evaluate.benchmarks={first},{second}", f"evaluate.relevance={second}", "trainer.log_every=7"]
    assert main(both) == 0
    assert (run / "eval/second/metrics.json").is_file() and (run / "explain/second/metrics.json").is_file()
    assert (run / "eval/first/decoding.json").stat().st_mtime_ns == done, "what is there is not asked again"
    assert weights.stat().st_mtime_ns == before
    now = read_config(run / "config.yaml")
    assert now.evaluate.benchmarks == f"{first},{second}" and now.trainer == trained.trainer
    caplog.clear()
    monkeypatch.setattr("prism_deco.api.load", lambda *_, **__: pytest.fail("nothing is left to be scored"))
    (run / "explain/second").rename(run / "explain/other")
    (run / "explain/other/metrics.json").rename(run / "explain/metrics.json")  # as runs once had it
    assert main(both) == 0
    assert "is complete. Use run_id=NAME" in caplog.text


@pytest.mark.parametrize(("variant", "known"), [("likelihood", True), ("generate", False)])
def test_a_blind_score_stands_beside_the_variant_it_was_recorded_in(variant, known):
    asked = SimpleNamespace(name="mini_pope", split="val", variants=[variant])
    assert ("mini_pope" in blind_scores(load_config([]), [asked])) == known
