"""Writes the benchmarks in the file formats of the official ones."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from prism_deco.miniature import benchmarks
from prism_deco.miniature.benchmarks import Split
from prism_deco.miniature.scene import CATEGORIES, IMAGE_SIZE, Box, Scene
from prism_deco.miniature.templates import UNANSWERABLE

_SIZE = {"width": IMAGE_SIZE, "height": IMAGE_SIZE}


def image_name(index: int) -> str:
    """File name of an image in the folder of its split."""
    return f"{index:06d}.png"


def export_benchmarks(folder: Path, split: Split) -> None:
    """Writes all benchmarks of a split, one folder each."""
    writers = {
        "pope": _pope,
        "vqav2": _vqav2,
        "gqa": _gqa,
        "vizwiz": _vizwiz,
        "textvqa": _textvqa,
        "refcoco": partial(_refcoco, owner="unc"),
        "refcoco+": partial(_refcoco, owner="unc"),
        "refcocog": partial(_refcoco, owner="umd"),
    }
    for name, write in writers.items():
        (folder / name).mkdir(parents=True)
        write(folder / name, split)


def _pope(folder: Path, split: Split) -> None:
    """`coco_pope_<subset>.json`: JSON lines."""
    for subset, chosen in benchmarks.pope_subsets(split).items():
        records = [
            {"question_id": number, "image": image_name(index), "text": q.text, "label": q.answer.lower()}
            for number, (index, q) in enumerate(chosen, start=1)
        ]
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"coco_pope_{subset}.json").write_bytes(lines.encode())


def _vqav2(folder: Path, split: Split) -> None:
    questions, annotations = [], []
    for number, (index, question) in enumerate(benchmarks.one_per_image(split, "vqav2"), start=1):
        answer = question.answer.lower()
        ids = {"question_id": number, "image_id": index}
        questions.append(ids | {"question": question.text})
        annotations.append(
            ids
            | {
                "question_type": " ".join(question.text.lower().split()[:2]),
                "answer_type": "yes/no" if answer in ("yes", "no") else _number_or_other(answer),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": text, "answer_confidence": "yes", "answer_id": annotator}
                    for annotator, text in enumerate(_ten(answer), start=1)
                ],
            }
        )
    (folder / "questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "annotations.json").write_text(json.dumps({"annotations": annotations}))


def _gqa(folder: Path, split: Split) -> None:
    """Records by question id."""
    records = {}
    for number, (index, question) in enumerate(benchmarks.one_per_image(split, "gqa"), start=1):
        answer = question.answer.lower()
        structure = "verify" if answer in ("yes", "no") else "query"
        records[f"{number:08d}"] = {
            "imageId": Path(image_name(index)).stem,
            "question": question.text,
            "answer": answer,
            "isBalanced": True,
            "types": {"structural": structure, "semantic": "rel", "detailed": question.template},
        }
    (folder / f"{split.name}_balanced_questions.json").write_text(json.dumps(records))


def _vizwiz(folder: Path, split: Split) -> None:
    records = [
        {
            "image": image_name(index),
            "question": question.text,
            "answers": [{"answer": text, "answer_confidence": "yes"} for text in _ten(question.answer)],
            "answer_type": UNANSWERABLE if question.answer == UNANSWERABLE else _number_or_other(question.answer),
            "answerable": int(question.answer != UNANSWERABLE),
        }
        for index, question in benchmarks.one_per_image(split, "vizwiz")
    ]
    (folder / f"{split.name}.json").write_text(json.dumps(records))


def _textvqa(folder: Path, split: Split) -> None:
    data = [
        {
            "question_id": number,
            "image_id": Path(image_name(index)).stem,
            "question": question.text,
            "answers": _ten(question.answer),
            "set_name": split.name,
        }
        for number, (index, question) in enumerate(benchmarks.one_per_image(split, "textvqa"), start=1)
    ]
    content = {"dataset_type": split.name, "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / f"TextVQA_0.5.1_{split.name}.json").write_text(json.dumps(content))


def _refcoco(folder: Path, split: Split, owner: str) -> None:
    """REFER's pickle of plain containers, and COCO's `instances.json` with all things of the split."""
    annotations, places = _annotations(split)
    refs, sent_id = [], 0
    for index, questions in benchmarks.expressions_per_thing(split, folder.name):
        # All expressions of an item describe one thing, which its box identifies in the image.
        target = questions[0].target
        assert target is not None
        annotation = annotations[places[index, target.box]]
        sentences = [
            {"sent": q.text, "sent_id": sent_id + offset, "tokens": q.text.split(), "raw": q.text}
            for offset, q in enumerate(questions)
        ]
        sent_id += len(sentences)
        refs.append(
            {
                "ref_id": len(refs),
                "ann_id": annotation["id"],
                "category_id": annotation["category_id"],
                "image_id": index,
                "file_name": image_name(index),
                "split": split.name,
                "sent_ids": [sentence["sent_id"] for sentence in sentences],
                "sentences": sentences,
            }
        )
    images = [{"id": index, "file_name": image_name(index)} | _SIZE for index in range(len(split.pools))]
    categories = [{"id": number, "name": name} for number, name in enumerate(CATEGORIES, start=1)]
    (folder / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    (folder / f"refs({owner}).p").write_bytes(pickle.dumps(refs, protocol=2))


def _annotations(split: Split) -> tuple[list[dict[str, Any]], dict[tuple[int, Box], int]]:
    """COCO's annotations, and their index by image and box."""
    annotations: list[dict[str, Any]] = []
    places: dict[tuple[int, Box], int] = {}
    for index, pool in enumerate(split.pools):
        for thing in pool.scene.things:
            places[index, thing.box] = len(annotations)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": index,
                    "category_id": CATEGORIES.index(thing.category) + 1,
                    "bbox": [thing.x, thing.y, thing.size, thing.size],
                    "area": thing.size**2,
                    "iscrowd": 0,
                }
            )
    return annotations, places


def objects(paths: Sequence[str], scenes: Sequence[Scene]) -> dict[str, Any]:
    """All things and plates of these images in COCO's format, with attributes as in CVAT's exports."""
    annotations = []
    for index, scene in enumerate(scenes):
        labels = [(thing.box, {"color": thing.color, "shape": thing.shape}) for thing in scene.things]
        if scene.plate is not None:
            tens, ones = divmod(scene.plate.number, 10)
            labels.append((scene.plate.box, {"tens": str(tens), "ones": str(ones)}))
        for (x1, y1, x2, y2), attributes in labels:
            box = {"image_id": index, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            annotations.append(box | {"id": len(annotations), "attributes": attributes})
    images = [{"id": index, "file_name": path} | _SIZE for index, path in enumerate(paths)]
    return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}


def _ten(answer: str) -> list[str]:
    """Answers of ten annotators. One adds a period: the official scorer normalises answers only if they differ."""
    return [answer] * 9 + [f"{answer}."]


def _number_or_other(answer: str) -> str:
    return "number" if answer.isdigit() else "other"
