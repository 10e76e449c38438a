"""RefCOCO, RefCOCO+ and RefCOCOg: the box of the region that an expression describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, checked, checked_list, index_unique, load_data_pickle, read_json
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, mean_score
from prism_deco.evaluation.metrics.boxes import Box, iou, normalise_box, parse_lenient, parse_strict, round_box, unpad

_ASK = "Please provide the bounding box coordinate of the region this sentence describes: "
_REF = {"ref_id": ID, "ann_id": ID, "image_id": ID, "split": str, "sentences": list}
_LARGEST = 1_000_000  # pixels


@BENCHMARKS.register("refcoco")
class RefCOCO(Benchmark):
    """REFER's files: a pickle of expressions (`annotations`) and COCO's `instances.json`. One question per sentence.

    Acc@0.5: the fraction of boxes with an IoU of at least 0.5 with the true box. `accuracy` is the PRISM harness's: the
    output must be a well-formed list, its coordinates are used unchanged, and the true box is rounded to two decimals.
    A model trained on images padded to squares answers in coordinates of the padded image;
    `accuracy_pad_corrected` converts them. The two `_lenient` metrics are lmms-eval's: the first four bracketed numbers
    of the output, compared with the exact box.

    Variants: `quoted` is the harness's prompt, `trained` the wording of LLaVA's training conversations.

    Args:
        instances: COCO boxes and image sizes.
    """

    VARIANTS: ClassVar = {"quoted": Variant(_ASK + '"{expression}"'), "trained": Variant(_ASK + "{expression}.")}
    target_keys = ("box", "width", "height")

    def __init__(self, *, instances: str, **common: Any):
        super().__init__(**common)
        self.instances = instances

    def read(self) -> list[Question]:
        path = self.annotation_path()
        boxes, images = self._read_instances()
        questions = []
        for number, ref in enumerate(checked_list(load_data_pickle(path), _REF, path, "RefCOCO"), start=1):
            if ref["split"] != self.split:
                continue
            where = f"{path}, record {number}"
            box, image = boxes.get(ref["ann_id"]), images.get(ref["image_id"])
            if box is None or image is None:
                raise UsageError(
                    f"{where}: annotation {ref['ann_id']} or image {ref['image_id']} is not in {self.instances}."
                )
            width, height = image["width"], image["height"]
            exact = normalise_box(box["bbox"], width, height)
            target = {"box": list(round_box(exact)), "exact_box": list(exact), "width": width, "height": height}
            for sentence in ref["sentences"]:
                sentence = checked(sentence, {"sent": str, "sent_id": ID}, f"{where}, sentences", "RefCOCO")
                questions.append(
                    self.question(
                        where,
                        f"{ref['ref_id']}-{sentence['sent_id']}",
                        {"expression": sentence["sent"]},
                        target,
                        image_id=ref["image_id"],
                        file_name=image["file_name"],
                    )
                )
        return questions

    def _read_instances(self) -> tuple[dict[Any, dict[str, Any]], dict[Any, dict[str, Any]]]:
        path = self.path(self.instances)
        content = checked(read_json(path), {"annotations": list, "images": list}, str(path), "COCO instances")
        annotations = checked_list(content["annotations"], {"id": ID, "bbox": list}, path, "COCO annotation")
        sizes = {"id": ID, "width": int, "height": int, "file_name": str}
        images = checked_list(content["images"], sizes, path, "COCO image")
        for number, record in enumerate(annotations, start=1):
            if not _is_box(record["bbox"]):
                raise UsageError(f"{path}, annotation {number}: {record['bbox']} is not a box [x, y, width, height].")
        for number, record in enumerate(images, start=1):
            if not (0 < record["width"] <= _LARGEST and 0 < record["height"] <= _LARGEST):
                raise UsageError(
                    f"{path}, image {number}: {record['width']} x {record['height']} pixels is not an image size."
                )
        return index_unique(annotations, "id", path), index_unique(images, "id", path)

    def parse(self, text: str, target: Mapping[str, Any]) -> list[float] | None:
        box = parse_strict(text)
        return list(box) if box is not None else None

    def score(self, answer: Any, text: str, target: Mapping[str, Any]) -> float:
        return float(iou(answer, target["box"]) >= 0.5)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        strict = [p.answer for p in predictions]
        lenient = [parse_lenient(p.text) for p in predictions]
        return {
            "accuracy": mean_score(predictions),
            "accuracy_pad_corrected": _accuracy(predictions, strict, corrected=True),
            "accuracy_lenient": _accuracy(predictions, lenient, corrected=False, exact=True),
            "accuracy_lenient_pad_corrected": _accuracy(predictions, lenient, corrected=True, exact=True),
        }

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        # Four sequences: x1 of all boxes, y1 of all, x2, y2.
        corners = list(zip(*(target["box"] for target in targets), strict=True))
        mean, middle = ([round(pick(corner), 2) for corner in corners] for pick in (fmean, median))
        # The candidates: the mean box, the median box and the whole image.
        return [json.dumps(box) for box in (mean, middle, [0.0, 0.0, 1.0, 1.0])]


def _is_box(value: list[Any]) -> bool:
    numbers = [number for number in value if isinstance(number, (int, float)) and abs(number) <= _LARGEST]
    return len(value) == len(numbers) == 4 and numbers[2] > 0 and numbers[3] > 0


def _accuracy(
    predictions: Sequence[Prediction], boxes: Sequence[Box | None], *, corrected: bool, exact: bool = False
) -> float:
    """Acc@0.5 in per cent: of raw boxes or those `corrected` for padding, with the rounded or the `exact` true box."""
    hits = 0
    for prediction, box in zip(predictions, boxes, strict=True):
        if box is None:
            continue
        target = prediction.target
        if corrected:
            box = unpad(box, target["width"], target["height"])
        # Predictions written by earlier versions only have the rounded box.
        truth = target.get("exact_box", target["box"]) if exact else target["box"]
        hits += iou(box, truth) >= 0.5
    return 100 * hits / len(predictions)
