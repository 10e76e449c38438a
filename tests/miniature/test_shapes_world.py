"""The miniature world on disk: official formats, the same content everywhere, built once."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_deco.config import load_choice
from prism_deco.evaluation import build_benchmark
from prism_deco.evaluation.annotations import load_data_pickle
from prism_deco.miniature.world import build_world

GOLDEN_PIXELS = "aa3248b304af0fe7047b6ce2105eb754b7e161687daca5a87ef80902278c31fb"
GOLDEN_FILES = "4003ab9594c659e4a21c06061520c42b2733e637ca8c69f53d1493fd2d40984c"
SIZES = {"train_images": 40, "val_images": 24, "test_images": 24, "val_items": 18, "test_items": 24}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return build_world(tmp_path_factory.mktemp("worlds") / "world", **SIZES, records_per_image=2)


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_golden_hashes(world):
    """These change only when what is built changes (raise world.VERSION then), never with the machine."""
    found = read(world / "world.json")
    files = hashlib.sha256(json.dumps(found["sha256"], sort_keys=True).encode()).hexdigest()
    assert (found["pixels_sha256"], files) == (GOLDEN_PIXELS, GOLDEN_FILES)


def test_hashes_describe_the_files(world):
    found = read(world / "world.json")
    counts = {"train": 40, "val": 24, "test": 24}
    paths = [world / "images" / split / f"{index:06d}.png" for split, n in counts.items() for index in range(n)]
    pixels = b"".join(np.asarray(Image.open(path)).tobytes() for path in paths)
    assert found["pixels_sha256"] == hashlib.sha256(pixels).hexdigest()
    assert found["sha256"]["train.json"] == hashlib.sha256((world / "train.json").read_bytes()).hexdigest()
    assert len(found["sha256"]) == 2 * 2 + 2 * (3 + 2 + 1 + 1 + 1 + 3 * 2)


def test_other_hash_seed_same_world_other_seed_other_world(world, tmp_path):
    code = (
        "import sys; from pathlib import Path; from prism_deco.miniature.world import build_world;"
        f"build_world(Path(sys.argv[1]), **{SIZES}, records_per_image=2)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again")], check=True, env=environment, timeout=120)
    other = build_world(tmp_path / "other", seed=1, **SIZES, records_per_image=2)
    first, again, other = (read(folder / "world.json") for folder in (world, tmp_path / "again", other))
    assert first == again
    assert first["pixels_sha256"] != other["pixels_sha256"]
    assert not set(first["sha256"].values()) & set(other["sha256"].values())


def test_a_finished_world_is_reused_and_nothing_else_is_overwritten(world, tmp_path):
    before = (world / "world.json").stat().st_mtime_ns
    assert build_world(world, **SIZES, records_per_image=2) == world
    assert (world / "world.json").stat().st_mtime_ns == before
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="not a miniature world"):
        build_world(tmp_path, **SIZES, records_per_image=2)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_an_interrupted_build_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("prism_deco.miniature.world.export_benchmarks", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_world(tmp_path / "world", **SIZES, records_per_image=1)
    assert list(tmp_path.iterdir()) == []


def _interrupt(*_):
    raise KeyboardInterrupt


def test_no_image_occurs_twice(world):
    images = [np.asarray(Image.open(path)).tobytes() for path in (world / "images").rglob("*.png")]
    assert len(images) == len(set(images)) == 40 + 24 + 24


def test_records_name_images_that_exist(world):
    for split in ("train", "val"):
        images = {record["image"] for record in read(world / f"{split}.json") if "image" in record}
        assert images == {f"{split}/{index:06d}.png" for index in range(SIZES[f"{split}_images"])}
        assert all((world / "images" / image).is_file() for image in images)


@pytest.mark.parametrize("split", ["val", "test"])
def test_official_fields(world, split):
    folder = world / "benchmarks" / split
    items = SIZES[f"{split}_items"]

    lines = (folder / "pope/coco_pope_adversarial.json").read_text().splitlines()
    pope = [json.loads(line) for line in lines]
    assert [set(record) for record in pope] == [{"question_id", "image", "text", "label"}] * (items // 6 * 2)
    assert sum(record["label"] == "yes" for record in pope) == len(pope) / 2

    questions = read(folder / "vqav2/questions.json")["questions"]
    annotations = read(folder / "vqav2/annotations.json")["annotations"]
    ids = [[(record["question_id"], record["image_id"]) for record in r] for r in (questions, annotations)]
    assert ids[0] == ids[1]
    assert len(questions) == items
    assert {a["answer_type"] for a in annotations} == {"yes/no", "number", "other"}
    assert all(len(a["answers"]) == 10 for a in annotations)

    gqa = read(folder / f"gqa/{split}_balanced_questions.json")
    assert all({"imageId", "question", "answer", "types"} <= set(record) for record in gqa.values())

    vizwiz = read(folder / f"vizwiz/{split}.json")
    assert len(vizwiz) == items and all(len(record["answers"]) == 10 for record in vizwiz)
    for record in vizwiz:
        assert record["answerable"] == (record["answers"][0]["answer"] != "unanswerable")

    textvqa = read(folder / f"textvqa/TextVQA_0.5.1_{split}.json")["data"]
    assert textvqa and all(len(record["answers"]) == 10 and record["answers"][0].isdigit() for record in textvqa)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize(("name", "owner"), [("refcoco", "unc"), ("refcoco+", "unc"), ("refcocog", "umd")])
def test_referring_expressions_point_at_pixels(world, split, name, owner):
    folder = world / "benchmarks" / split / name
    refs = load_data_pickle(folder / f"refs({owner}).p")
    instances = read(folder / "instances.json")
    annotations = {record["id"]: record for record in instances["annotations"]}
    files = {record["id"]: record["file_name"] for record in instances["images"]}
    names = {record["id"]: record["name"] for record in instances["categories"]}
    assert 0 < sum(len(ref["sentences"]) for ref in refs) <= SIZES[f"{split}_items"]
    for ref in refs:
        annotation = annotations[ref["ann_id"]]
        assert (annotation["image_id"], annotation["category_id"]) == (ref["image_id"], ref["category_id"])
        assert [s["sent_id"] for s in ref["sentences"]] == ref["sent_ids"]
        assert ref["split"] == split
        x, y, width, height = annotation["bbox"]
        image = np.asarray(Image.open(world / "images" / split / files[ref["image_id"]])).astype(int)
        middle = image[y + height // 2, x + width // 2]
        # The background is grey and the things are not.
        assert np.ptp(middle) > 40, names[ref["category_id"]]
        _, shape = names[ref["category_id"]].split()
        for sentence in ref["sentences"]:
            head = sentence["sent"].split(" that is ")[0].split()
            assert head[-1] in (shape, "shape") and sentence["tokens"] == sentence["sent"].split()


def test_the_shipped_choice_has_the_arguments_of_the_builder():
    keys = set(load_choice("data", "shapes")) - {"name", "family", "num_workers", "statistics"}
    defaults = build_world.__kwdefaults__
    assert keys == set(defaults)
    assert all(load_choice("data", "shapes")[key] == default for key, default in defaults.items())


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("name", load_choice("benchmark", "mini")["members"])
def test_the_readers_of_the_official_formats_find_every_question_and_image(world, split, name):
    questions = build_benchmark(name, root=str(world), split=split).read()
    assert 0 < len(questions) <= SIZES[f"{split}_items"]
    assert len({question.question_id for question in questions}) == len(questions)
    assert all(path.is_file() for question in questions for path in question.paths)


def test_objects_are_those_of_the_benchmarks(world):
    """What probes read agrees with the official files of the same images."""
    objects = read(world / "val-objects.json")
    assert [image["file_name"] for image in objects["images"]] == [f"val/{index:06d}.png" for index in range(24)]
    instances = read(world / "benchmarks" / "val" / "refcoco" / "instances.json")
    names = {record["id"]: record["name"] for record in instances["categories"]}
    expected = [(r["image_id"], r["bbox"], *names[r["category_id"]].split()) for r in instances["annotations"]]
    own = [(r["image_id"], r["bbox"], r["attributes"]) for r in objects["annotations"]]
    assert [(i, box, a["color"], a["shape"]) for i, box, a in own if "shape" in a] == expected
    plates = {index: a["tens"] + a["ones"] for index, _, a in own if "tens" in a}
    asked = read(world / "benchmarks/val/textvqa/TextVQA_0.5.1_val.json")["data"]
    assert asked and all(plates[int(record["image_id"])] == record["answers"][0] for record in asked)
