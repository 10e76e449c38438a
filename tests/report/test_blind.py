import json

import pytest

from prism_deco.config import load_config, save_config
from prism_deco.report import blind


def _run(folder, *overrides, scores):
    save_config(load_config(list(overrides)), folder / "config.yaml")
    for name, (benchmark, value) in scores.items():
        out = folder / "eval" / name
        out.mkdir(parents=True)
        content = {"benchmark": benchmark, "primary": "accuracy", "metrics": {"accuracy": value, "f1": 1.0}}
        (out / "metrics.json").write_text(json.dumps(content))
    return folder


def test_recorded_scores_are_found_for_the_same_settings_only(tmp_path, monkeypatch):
    monkeypatch.setattr(blind, "REFERENCE", tmp_path / "blind.json")
    assert blind.blind_scores(load_config(), None) is None
    scores = {"mini_pope": ("mini_pope", 51.234), "mini_pope-test": ("mini_pope", 49.0)}
    run = _run(tmp_path, "recipe.blind=true", "seed=3", scores=scores)
    entry = blind.record(run, tmp_path / "blind.json")
    assert entry["scores"] == {"val": {"mini_pope": 51.23}, "test": {"mini_pope": 49.0}}
    assert entry["command"] == "prism-deco train llm=mini_qwen2 recipe.blind=true seed=3"
    assert blind.blind_scores(load_config(["projector=linear", "backbone=mini_clip"]), None) == {"mini_pope": 51.23}
    assert blind.blind_scores(load_config(), "test") == {"mini_pope": 49.0}
    for other in ("llm=mini_phi", "recipe.lr=1e-3", "recipe.epochs=2", "data.seed=5"):
        assert blind.blind_scores(load_config([other]), None) is None, other


def test_a_run_that_saw_images_or_was_not_scored_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trained with its images"):
        blind.record(_run(tmp_path, scores={}), tmp_path / "blind.json")
    with pytest.raises(ValueError, match="has no scores"):
        blind.record(_run(tmp_path, "recipe.blind=true", scores={}), tmp_path / "blind.json")


def test_the_shipped_reference_holds_the_default_settings():
    scores = blind.blind_scores(load_config(), None)
    assert scores is not None and len(scores) == 8, "repeat the command in blind.json, then prism-deco record-blind"
