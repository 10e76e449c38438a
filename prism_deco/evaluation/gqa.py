"""GQA: compositional questions about real scenes, one short answer each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, checked, read_json
from prism_deco.evaluation.base import BENCHMARKS, SHORT, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, mean_score
from prism_deco.evaluation.metrics.exact import strip_all_punctuation, strip_trailing_period


@BENCHMARKS.register("gqa")
class GQA(Benchmark):
    """A JSON object of records {imageId, question, answer} by question id (`testdev_balanced_questions.json`).

    `accuracy` first deletes all punctuation of the output (PRISM harness), `accuracy_llava` only periods at its end.
    """

    VARIANTS: ClassVar = {"short": Variant(SHORT)}
    target_keys = ("answer",)

    def read(self) -> list[Question]:
        path = self.annotation_path()
        content = read_json(path)
        if not isinstance(content, dict) or not content:
            raise UsageError(f"{path} is not a GQA file: expected an object of records by question id.")
        questions = []
        for question_id, record in content.items():
            where = f"{path}, question {question_id}"
            record = checked(record, {"imageId": ID, "question": str, "answer": str}, where, "GQA")
            fields, target = {"question": record["question"]}, {"answer": record["answer"]}
            questions.append(self.question(where, question_id, fields, target, imageId=record["imageId"]))
        return questions

    def parse(self, text: str, target: Mapping[str, Any]) -> str:
        return strip_all_punctuation(text)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        answered = [p for p in predictions if p.output is not None]
        # Missing outputs are not in this list, but in the number of predictions: they are wrong.
        llava = [strip_trailing_period(p.text) == p.target["answer"] for p in answered]
        return {"accuracy": mean_score(predictions), "accuracy_llava": 100 * sum(llava) / len(predictions)}
