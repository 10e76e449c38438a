"""TextVQA: questions that need the text in the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import (
    ID,
    AnnotatorBenchmark,
    checked_list,
    read_json_lines,
    read_records,
    ten_answers,
)
from prism_deco.evaluation.base import BENCHMARKS, SHORT
from prism_deco.evaluation.items import Question, Variant
from prism_deco.evaluation.metrics import vqa

_OCR_LINE = "Reference OCR token:"
_WITH_OCR = SHORT.replace("{question}", f"{{question}}\n{_OCR_LINE} {{ocr}}")


@BENCHMARKS.register("textvqa")
class TextVQA(AnnotatorBenchmark):
    """The official JSON {data: [{question_id, image_id, question, answers}]}.

    Variants: `ocr` adds the tokens found by an OCR system to the prompt (LLaVA's protocol), `plain` does not. `prism`
    adds them as the PRISM harness does (vlm-evaluation's `textvqa.py`): it uses the whole text of LLaVA's JSON lines,
    which ends in the instruction, as the question, so that the instruction appears twice. Its prompt without OCR tokens
    cuts that text before them, which is `plain`.

    Args:
        ocr: file of the OCR tokens: TextVQA's Rosetta JSON {data: [{image_id, ocr_tokens}]}, or the JSON lines of
            LLaVA's prompts {question_id: the image's id, text}. Only needed by the variants `ocr` and `prism`.
    """

    VARIANTS: ClassVar = {
        "ocr": Variant(_WITH_OCR),
        "prism": Variant(SHORT.replace("{question}", _WITH_OCR)),
        "plain": Variant(SHORT),
    }
    process = staticmethod(vqa.process_evalai)
    conventions: ClassVar = {"accuracy": vqa.evalai}

    def __init__(self, *, ocr: str | None = None, **common: Any):
        super().__init__(**common)
        self.ocr = ocr
        self.with_ocr = [variant for variant in self.variants if "{ocr}" in self.VARIANTS[variant].template]
        if self.with_ocr and ocr is None:
            raise UsageError(f"{self.name}: the variant {self.with_ocr[0]!r} needs the key ocr, the OCR tokens' file.")

    def read(self) -> list[Question]:
        path = self.annotation_path()
        fields = {"question_id": ID, "image_id": str, "question": str, "answers": list}
        tokens = read_ocr(self.path(self.ocr)) if self.ocr is not None and self.with_ocr else None
        questions = []
        for number, record in enumerate(read_records(path, "data", fields, "TextVQA"), start=1):
            where = f"{path}, record {number}"
            image_id = record["image_id"]
            if tokens is not None and image_id not in tokens:
                raise UsageError(f"{where}: {self.ocr} has no OCR tokens of the image {image_id}.")
            target = {"answers": ten_answers(record["answers"], where)}
            # TextVQA's questions are lower-case; LLaVA's prompts, which the harness uses, capitalise them.
            question = record["question"][:1].upper() + record["question"][1:]
            filled = {"question": question, "ocr": tokens[image_id] if tokens is not None else ""}
            questions.append(self.question(where, record["question_id"], filled, target, image_id=image_id))
        return questions


def read_ocr(path: Path) -> dict[str, str]:
    """OCR tokens by image id, in the prompt's form "t1, t2"."""
    if path.suffix == ".jsonl":
        records = checked_list(read_json_lines(path), {"question_id": str, "text": str}, path, "TextVQA prompt")
        texts = {record["question_id"]: record["text"] for record in records}
        # What follows `_OCR_LINE` on its line of the prompt.
        return {image_id: text.partition(_OCR_LINE)[2].partition("\n")[0].strip() for image_id, text in texts.items()}
    records = read_records(path, "data", {"image_id": str, "ocr_tokens": list}, "TextVQA OCR")
    return {record["image_id"]: ", ".join(map(str, record["ocr_tokens"])) for record in records}
