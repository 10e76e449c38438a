"""VizWiz: blind people's questions about their photos; many cannot be answered."""

from __future__ import annotations

from typing import ClassVar

from prism_deco.evaluation.annotations import AnnotatorBenchmark, checked_list, read_json, ten_answers
from prism_deco.evaluation.base import BENCHMARKS
from prism_deco.evaluation.items import Question, Variant
from prism_deco.evaluation.metrics import vqa


@BENCHMARKS.register("vizwiz")
class VizWiz(AnnotatorBenchmark):
    """A JSON list of {image, question, answers, answerable}; a question's id is its index in the list.

    `accuracy` is the PRISM harness's score, `accuracy_official` that of VizWiz's own script, and `accuracy_llava` that
    of the script after LLaVA's processing of the prediction.
    """

    VARIANTS: ClassVar = {
        "short": Variant(
            "{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            "\nAnswer the question using a single word or phrase."
        )
    }
    process = staticmethod(vqa.process_prism_vizwiz)
    conventions: ClassVar = {
        "accuracy": vqa.prism_vizwiz,
        "accuracy_official": vqa.vizwiz,
        "accuracy_llava": vqa.vizwiz_llava,
    }

    def read(self) -> list[Question]:
        path = self.annotation_path()
        fields = {"image": str, "question": str, "answers": list, "answerable": int}
        questions = []
        for index, record in enumerate(checked_list(read_json(path), fields, path, "VizWiz")):
            where = f"{path}, record {index + 1}"
            target = {
                "answers": ten_answers(record["answers"], where),
                "type": "answerable" if record["answerable"] else "unanswerable",
            }
            questions.append(
                self.question(where, index, {"question": record["question"]}, target, image=record["image"])
            )
        return questions
