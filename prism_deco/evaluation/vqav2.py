"""VQAv2: open questions about COCO images."""

from __future__ import annotations

from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, AnnotatorBenchmark, index_unique, read_records, ten_answers
from prism_deco.evaluation.base import BENCHMARKS, SHORT
from prism_deco.evaluation.items import Question, Variant
from prism_deco.evaluation.metrics import vqa

_QUESTION = {"question_id": ID, "image_id": ID, "question": str}
_ANNOTATION = {"question_id": ID, "image_id": ID, "answer_type": str, "answers": list}


@BENCHMARKS.register("vqav2")
class VQAv2(AnnotatorBenchmark):
    """The questions file and the annotations file of a split with public answers.

    `accuracy` is the PRISM harness's score, `accuracy_official` that of the challenge's script, and `accuracy_llava`
    that of the script after LLaVA's processing of the prediction.

    Args:
        questions: the questions file.
    """

    VARIANTS: ClassVar = {"short": Variant(SHORT)}
    process = staticmethod(vqa.process)
    conventions: ClassVar = {
        "accuracy": vqa.prism_vqav2,
        "accuracy_official": vqa.official,
        "accuracy_llava": vqa.llava,
    }

    def __init__(self, *, questions: str, **common: Any):
        super().__init__(**common)
        self.questions = questions

    def read(self) -> list[Question]:
        path, answers_path = self.path(self.questions), self.annotation_path()
        annotations = read_records(answers_path, "annotations", _ANNOTATION, "VQAv2 annotations")
        by_question = index_unique(annotations, "question_id", answers_path)
        questions = []
        for number, record in enumerate(read_records(path, "questions", _QUESTION, "VQAv2 questions"), start=1):
            where = f"{path}, record {number}"
            annotation = by_question.get(record["question_id"])
            if annotation is None or annotation["image_id"] != record["image_id"]:
                raise UsageError(
                    f"{where}: question {record['question_id']} about image {record['image_id']} is not in "
                    f"{answers_path}: check that both files belong to the same split."
                )
            answers = ten_answers(annotation["answers"], f"{answers_path}, question {record['question_id']}")
            target = {"answers": answers, "type": annotation["answer_type"]}
            fields = {"question": record["question"]}
            questions.append(self.question(where, record["question_id"], fields, target, image_id=record["image_id"]))
        return questions
