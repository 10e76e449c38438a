"""Scores of image-blind runs: how they are recorded, and for which settings they are found again."""

import json
import shlex

import pytest
from record_blind import main, record

from prism_deco.config import load_config, save_config
from prism_deco.report import baselines
from prism_deco.training.manifest import config_hash


def _run(folder, *overrides, scores):
    save_config(load_config(list(overrides)), folder / "config.yaml")
    for name, (benchmark, value) in scores.items():
        out = folder / "eval" / name
        out.mkdir(parents=True)
        content = {"benchmark": benchmark, "primary": "accuracy", "metrics": {"accuracy": value, "f1": 1.0}}
        (out / "metrics.json").write_text(json.dumps(content))
    return folder


def test_recorded_scores_are_found_for_the_same_settings_only(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "REFERENCE", tmp_path / "blind.json")
    assert baselines.blind_scores(load_config(), None) is None
    scores = {"mini_pope": ("mini_pope", 51.234), "mini_pope-test": ("mini_pope", 49.0)}
    run = _run(tmp_path, "recipe.blind=true", "seed=3", scores=scores)
    entry = record(run, tmp_path / "blind.json")
    assert entry["scores"] == {"val": {"mini_pope": 51.23}, "test": {"mini_pope": 49.0}}
    assert entry["command"].endswith("recipe=mini trainer=cpu recipe.blind=true seed=3")
    assert baselines.blind_scores(load_config(["projector=linear", "backbone=mini_clip"]), None) == {"mini_pope": 51.23}
    assert baselines.blind_scores(load_config(), "test") == {"mini_pope": 49.0}
    for other in ("llm=mini_phi", "recipe.lr=1e-3", "recipe.epochs=2", "data.seed=5"):
        assert baselines.blind_scores(load_config([other]), None) is None, other


def test_a_run_that_saw_images_or_was_not_scored_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="trained with its images"):
        record(_run(tmp_path, scores={}), tmp_path / "blind.json")
    with pytest.raises(SystemExit, match="has no scores"):
        record(_run(tmp_path, "recipe.blind=true", scores={}), tmp_path / "blind.json")


def test_the_shipped_reference_holds_the_default_settings():
    scores = baselines.blind_scores(load_config(), None)
    assert scores is not None and len(scores) == 8, (
        "repeat the command in blind.json, then run runs/reference/miniature/record_blind.py"
    )


def test_the_recorded_command_trains_the_same_run(tmp_path):
    changed = ["llm=mini_phi", "recipe.blind=true", "recipe.lr=1e-5", "data.limit=50", "evaluate.split=test"]
    changed += [f"runs_dir={tmp_path}", "evaluate.benchmarks=null", "recipe.betas=[0.8,0.9]"]
    run = _run(tmp_path, *changed, scores={"mini_gqa": ("mini_gqa", 1.0)})
    entry = record(run, tmp_path / "blind.json")
    program, command, *overrides = shlex.split(entry["command"])
    assert (program, command) == ("prism-deco", "train") and "data=shapes" in overrides
    assert config_hash(load_config(overrides)) == entry["config_hash"] == config_hash(load_config(changed))
    (tmp_path / "mine.yaml").write_text("family: avgpool\n")
    (tmp_path / "own").mkdir()
    own = _run(tmp_path / "own", *changed, f"projector={tmp_path}/mine.yaml", scores={"mini_gqa": ("mini_gqa", 1.0)})
    assert " projector=mine.yaml " in record(own, tmp_path / "blind.json")["command"]


def test_scores_are_filed_under_the_benchmark_s_own_split(tmp_path, monkeypatch):
    monkeypatch.setattr(baselines, "REFERENCE", tmp_path / "blind.json")
    own = {"seed": ("seed", 40.0), "textvqa": ("textvqa", 5.0), "refcoco-testA": ("refcoco", 2.0)}
    run = _run(tmp_path, "recipe.blind=true", scores=own)
    monkeypatch.setattr("sys.argv", ["record_blind.py", str(run), "--out", str(tmp_path / "blind.json")])
    main()
    (entry,) = json.loads((tmp_path / "blind.json").read_text()).values()
    assert entry["scores"] == {"testA": {"refcoco": 2.0}, "own": {"seed": 40.0}, "val": {"textvqa": 5.0}}
    assert baselines.blind_scores(load_config(), None) == {"seed": 40.0, "textvqa": 5.0}
    assert baselines.blind_scores(load_config(), "testA") == {"refcoco": 2.0}
