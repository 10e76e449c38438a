"""The miniature world's files are read like the official ones, and can be answered in full."""

import json

import pytest

from prism_deco.evaluation import build_benchmark, chance, evaluate, load_predictions, resolve
from prism_deco.miniature.world import build_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return build_world(
        tmp_path_factory.mktemp("mini") / "world",
        train_images=1,
        val_images=24,
        test_images=24,
        records_per_image=1,
        val_items=12,
        test_items=18,
    )


def truth(target):
    if "box" in target:
        return json.dumps(target["box"])
    return target["answer"] if "answer" in target else max(target["answers"], key=target["answers"].count)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("name", resolve("mini"))
def test_the_truth_scores_full_marks(world, fake_model, tmp_path, name, split):
    benchmark = build_benchmark(name, root=world, split=split)
    answers = {(item.paths[0], item.prompt): truth(item.target) for item in benchmark.items()}
    result = evaluate(fake_model(lambda *asked: answers[asked]), benchmark, tmp_path, progress=False)
    assert result["metrics"]["accuracy"] == 100 and result["invalid_rate"] == 0
    assert 8 <= result["n"] <= 20
    assert all(item.paths[0].parent == world / "images" / split for item in benchmark.items())
    assert chance(benchmark, load_predictions(tmp_path / "predictions.jsonl")) < 100
