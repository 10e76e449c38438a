"""MMBench: multiple choice with rotated options; a question is correct if all of its rotations are."""

from __future__ import annotations

import base64
import binascii
import csv
import shutil
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, by_part, mean_score
from prism_deco.evaluation.metrics.choice import infer_option
from prism_deco.evaluation.seed import LETTER

_COLUMNS = ("index", "question", "hint", "A", "B", "answer", "category", "image")
_ROTATION = 1_000_000  # the rotations of question i have the indices i + k * 1,000,000
_LARGEST_CELL = 1 << 28  # bytes; an image is one cell, and csv's own limit is 128 KiB


@BENCHMARKS.register("mmbench")
class MMBench(Benchmark):
    """The TSV with images in base64.

    `accuracy` is circular (all rotations must be correct), `accuracy_vanilla` only scores the unrotated questions.
    Outputs with neither a lone letter nor the text of a single option count as wrong: the official script asks a
    language model about them, which an offline harness cannot do.
    """

    VARIANTS: ClassVar = {"letter": Variant("{hint}" + LETTER)}
    target_keys = ("answer", "options", "category", "question", "rotation")

    def read(self) -> list[Question]:
        path = self.annotation_path()
        # The model reads images from files; the folder is removed with this object.
        folder = Path(mkdtemp(prefix="mmbench-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return [_question(record, f"{path}, record {k}", folder) for k, record in enumerate(_read_rows(path), start=1)]

    def parse(self, text: str, target: Mapping[str, Any]) -> str | None:
        return infer_option(text, target["options"])

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        unrotated = [p for p in predictions if p.target["rotation"] == 0]
        metrics = {"accuracy": _circular(predictions)}
        if unrotated:
            metrics["accuracy_vanilla"] = mean_score(unrotated)
        parts = by_part(predictions, "category")
        return metrics | {f"accuracy/{category}": _circular(part) for category, part in parts.items()}

    def strata(self, predictions: Sequence[Prediction]) -> dict[str, list[float]]:
        return {"all": [100.0 * right for right in _all_right(predictions)]}

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return list("ABCD")


def _all_right(predictions: Sequence[Prediction]) -> list[bool]:
    return [all(p.score == 1 for p in rotations) for rotations in by_part(predictions, "question").values()]


def _circular(predictions: Sequence[Prediction]) -> float:
    right = _all_right(predictions)
    return 100 * sum(right) / len(right)


def _question(record: Mapping[str, str], where: str, folder: Path) -> Question:
    options = {letter: record[letter] for letter in "ABCD" if record.get(letter)}
    if not record["index"].isdecimal() or record["answer"] not in options:
        raise UsageError(f"{where} is not an MMBench record: its index or answer is unknown.")
    rotation, number = divmod(int(record["index"]), _ROTATION)
    image = folder / f"{number}.jpg"
    # The rotations of a question share its image.
    if not image.exists():
        try:
            image.write_bytes(base64.b64decode(record["image"], validate=True))
        except binascii.Error as error:
            raise UsageError(f"{where}: the image is not base64 ({error}).") from error
    fields = {
        "hint": f"{record['hint']}\n" if record["hint"] else "",
        "question": record["question"],
        "options": "\n".join(f"{letter}. {text}" for letter, text in options.items()),
    }
    target = {
        "answer": record["answer"],
        "options": options,
        "category": record["category"],
        "question": number,
        "rotation": rotation,
    }
    return Question(
        question_id=record["index"],
        images=(image.name,),
        paths=(image,),
        fields=fields,
        target=target,
        stratum=record["category"],
        group=str(number),
    )


def _read_rows(path: Path) -> list[dict[str, str]]:
    # The limit is global to the csv module: it is restored at the end.
    limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: check root=FOLDER.") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not a tab-separated table ({error}).") from error
    finally:
        csv.field_size_limit(limit)
    if not rows:
        raise UsageError(f"{path} holds no rows: download it again.")
    for number, row in enumerate(rows, start=1):
        missing = [column for column in _COLUMNS if row.get(column) is None]
        if missing:
            raise UsageError(f"{path}, record {number} is not an MMBench record: it has no {', '.join(missing)}.")
    return rows
