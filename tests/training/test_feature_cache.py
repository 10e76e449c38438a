"""Runs on cached features beside runs whose towers work in every step."""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

import prism_deco
from prism_deco.data.images import open_image
from prism_deco.training.progress import read_metrics

ON, OFF = "trainer.feature_cache=true", "trainer.feature_cache=false"
CLOSE = {"rel": 2e-5}
"""Kernels may round differently for another number of images at a time, and so do all steps after them."""


@pytest.fixture
def world(colors, tmp_path):
    """The colours, a record of two images, and one whose image is broken: settings of `data`."""
    folder = tmp_path / "world"
    folder.mkdir()
    for image in (colors / "images").iterdir():
        (folder / image.name).write_bytes(image.read_bytes())
    (folder / "broken.png").write_bytes((folder / "red40.png").read_bytes()[:60])
    entries = json.loads((colors / "train.json").read_text())
    talk = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "No"}]
    entries.append({"id": "two", "image": ["red40.png", "blue90.png"], "conversations": talk})
    entries.append({**entries[0], "id": "broken", "image": "broken.png"})
    (folder / "train.json").write_text(json.dumps(entries))
    return [f"data.json={folder / 'train.json'}", f"data.image_root={folder}"]


def _rows(folder):
    return [{k: v for k, v in row.items() if not isinstance(v, dict)} for row in read_metrics(folder)]


def _manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def _assert_same(folder, reference):
    rows, expected = _rows(folder), _rows(reference)
    assert len(rows) == len(expected) > 5
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine == pytest.approx(theirs, **CLOSE)
    counts = ("bad_images", "text_tokens_cut", "samples", "params")
    assert [_manifest(folder)[key] for key in counts] == [_manifest(reference)[key] for key in counts]
    assert _manifest(folder)["feature_caches"] and _manifest(reference)["feature_caches"] == []


@pytest.mark.parametrize(
    "options",
    [
        # As the miniature is by default: standardised features, masked rounds.
        ["data.on_bad_image=blank", "data.num_workers=2", "data.val_fraction=0.3"],
        pytest.param(
            ["data.on_bad_image=skip", "projector=linear", "recipe.packing=true", "recipe.turn_mask=causal",
             "recipe.standardise_features=false"],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["pooled", "all patches, packed"],
)  # fmt: skip
def test_losses_are_those_of_towers_at_work(start, tmp_path, world, options):
    for name, mode in (("live", OFF), ("cached", ON)):
        job = start(*options, *world, mode, "trainer.samples=2", "trainer.preflight=true", run=name)
        assert job.wait() == [0], job.log.read_text()[-3000:]
    _assert_same(tmp_path / "cached", tmp_path / "live")
    assert _manifest(tmp_path / "live")["bad_images"] == 4
    digest, *rest = _manifest(tmp_path / "cached")["feature_caches"]
    assert len(rest) == ("data.val_fraction=0.3" in options)
    stored = Path(os.environ["PRISM_DECO_CACHE"]) / "features" / digest / "key.json"
    assert json.loads(stored.read_text())["compute"] == "float32"
    live, cached = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("live", "cached"))
    assert live.keys() == cached.keys()
    statistics = [name for name in live if name.startswith("feature_")]
    assert len(statistics) == (2 if "blank" in options[0] else 0)
    assert all(live[name].equal(cached[name]) for name in statistics)
    # The towers are in their place again: random ones are part of the model folder.
    image = open_image(tmp_path / "world" / "red40.png")
    assert prism_deco.load(tmp_path / "cached").generate([image], ["What color is it?"], max_new_tokens=2)


def test_a_bad_image_ends_the_run_as_ever(start, tmp_path, world):
    messages = []
    for name, mode in (("live", OFF), ("cached", ON)):
        job = start(*world, mode, run=name)
        assert job.wait() == [2], job.log.read_text()[-3000:]
        [line] = [line for line in job.log.read_text().splitlines() if line.startswith("prism-deco: error: ")]
        messages.append(line)
    assert messages[0] == messages[1] and "Record broken: " in messages[0]


def test_a_run_may_go_on_without_its_cache(start, tmp_path):
    every = ["trainer.checkpoint_every=2", "recipe.epochs=4"]
    whole = start(*every, ON, run="whole")
    assert whole.wait() == [0], whole.log.read_text()[-3000:]
    job = start(*every, ON)
    job.until(lambda folder: (folder / "checkpoints" / "step_000004").is_dir())
    job.kill()
    again = start(*every, OFF)
    assert again.wait() == [0], again.log.read_text()[-3000:]
    for mine, theirs in zip(_rows(tmp_path / "run"), _rows(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, **CLOSE)


@pytest.mark.parametrize(
    ("strategy", "ranks", "options"),
    [
        ("fsdp", 2, []),
        pytest.param("ddp", 2, ["data.num_workers=1"], marks=pytest.mark.slow),
        pytest.param("fsdp", 4, ["projector=c_abstractor", "projector.hidden_dim=32"], marks=pytest.mark.slow),
    ],
)
def test_every_process_builds_and_none_waits(start, tmp_path, world, strategy, ranks, options):
    """Batches of texts alone among them: a rank without images must not gather towers that the others leave alone."""
    options = ["recipe.epochs=2", "recipe.grad_clip=0.5", "data.on_bad_image=blank", *options, *world]
    alone = start(*options, OFF, run="alone")
    assert alone.wait() == [0], alone.log.read_text()[-3000:]
    job = start(*options, ON, f"trainer.strategy={strategy}", ranks=ranks)
    assert job.wait() == [0] * ranks, job.log.read_text()[-3000:]
    rows, expected = _rows(tmp_path / "run"), _rows(tmp_path / "alone")
    assert len(rows) == len(expected)
    for mine, theirs in zip(rows, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3)  # float32 sums in another order, too
    assert _manifest(tmp_path / "run")["params"] == _manifest(tmp_path / "alone")["params"]
    assert len(_manifest(tmp_path / "run")["feature_caches"]) == 1
    assert prism_deco.load(tmp_path / "run").config.trainer.strategy == strategy
