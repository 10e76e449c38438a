"""TextVQA: questions that need the text in the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from prism_deco.evaluation.annotations import (
    ID,
    checked,
    checked_list,
    read_json,
    read_json_lines,
    ten_answers,
)
from prism_deco.evaluation.annotators import AnnotatorBenchmark
from prism_deco.evaluation.base import BENCHMARKS, SHORT
from prism_deco.evaluation.items import Question, Variant
from prism_deco.evaluation.metrics import vqa, vqa_text

_OCR_LINE = "Reference OCR token:"


@BENCHMARKS.register("textvqa")
class TextVQA(AnnotatorBenchmark):
    """The official JSON {data: [{question_id, image_id, question, answers}]}.

    Variants: `ocr` shows the model the tokens that an OCR system found (LLaVA's protocol), `plain` does not.

    Args:
        annotations: the annotation file.
        ocr: OCR tokens: TextVQA's Rosetta JSON {data: [{image_id, ocr_tokens}]}, or the JSON lines of LLaVA's
            prompts {question_id: the image's id, text}. Needed by the variant `ocr` only.
    """

    VARIANTS: ClassVar = {
        "ocr": Variant(f"{{question}}\n{_OCR_LINE} {{ocr}}\nAnswer the question using a single word or phrase."),
        "plain": Variant(SHORT),
    }
    process = staticmethod(vqa_text.process_evalai)
    conventions: ClassVar = {"accuracy": vqa.evalai}

    def __init__(self, *, annotations: str, ocr: str | None = None, **common: Any):
        super().__init__(**common)
        self.annotations = annotations
        self.ocr = ocr
        if "ocr" in self.variants and ocr is None:
            raise ValueError(f"{self.name}: the variant 'ocr' needs the key ocr, the file of the OCR tokens.")

    def read(self) -> list[Question]:
        path = self.path(self.annotations)
        content = checked(read_json(path), {"data": list}, str(path), "TextVQA")
        fields = {"question_id": ID, "image_id": str, "question": str, "answers": list}
        tokens = read_ocr(self.path(self.ocr)) if self.ocr is not None and "ocr" in self.variants else None
        questions = []
        for number, record in enumerate(checked_list(content["data"], fields, path, "TextVQA"), start=1):
            where = f"{path}, record {number}"
            image_id = record["image_id"]
            if tokens is not None and image_id not in tokens:
                raise ValueError(f"{where}: {self.ocr} has no OCR tokens of the image {image_id}.")
            target = {"answers": ten_answers(record["answers"], where)}
            filled = {"question": record["question"], "ocr": tokens[image_id] if tokens is not None else ""}
            questions.append(self.question(where, record["question_id"], filled, target, image_id=image_id))
        return questions


def read_ocr(path: Path) -> dict[str, str]:
    """OCR tokens by image id, as the prompt lists them: "t1, t2"."""
    if path.suffix == ".jsonl":
        records = checked_list(read_json_lines(path), {"question_id": str, "text": str}, path, "TextVQA prompt")
        return {record["question_id"]: _listed(record["text"]) for record in records}
    content = checked(read_json(path), {"data": list}, str(path), "TextVQA OCR")
    records = checked_list(content["data"], {"image_id": str, "ocr_tokens": list}, path, "TextVQA OCR")
    return {record["image_id"]: ", ".join(map(str, record["ocr_tokens"])) for record in records}


def _listed(text: str) -> str:
    return text.partition(_OCR_LINE)[2].partition("\n")[0].strip()
