"""POPE: is an object in the image? Three subsets that differ in how absent objects were chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, checked, read_json_lines
from prism_deco.evaluation.base import BENCHMARKS, SHORT, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, by_part
from prism_deco.evaluation.metrics.yesno import parse_pope, says_yes_or_no, yes_no_rates


@BENCHMARKS.register("pope")
class POPE(Benchmark):
    """JSON lines {question_id, image, text, label}, one file per subset: `annotations` has the field `{subset}`.

    `likelihood` compares the probabilities of Yes and No at the first answer token (PRISM harness, whose accuracy
    matches the paper's column); `generate` parses the generated answer (LLaVA, which reports its mean F1). Every metric
    is the mean over the subsets.

    Args:
        subsets: names of the subsets.
        choices: the words for yes and no, in this order.
    """

    VARIANTS: ClassVar = {"likelihood": Variant(SHORT, likelihood=True), "generate": Variant(SHORT)}
    target_keys = ("answer", "subset")

    def __init__(self, *, subsets: Sequence[str], choices: Sequence[str] = ("Yes", "No"), **common: Any):
        super().__init__(**common)
        if len(choices) != 2:
            raise UsageError(f"{self.name}: choices are the words for yes and no, not {', '.join(choices)}.")
        self.parts = tuple(subsets)
        self.choices = tuple(choices)

    def read(self) -> list[Question]:
        return [question for subset in self.parts for question in self._read_subset(subset)]

    def _read_subset(self, subset: str) -> list[Question]:
        path = self.annotation_path(subset=subset)
        questions = []
        for number, record in enumerate(read_json_lines(path), start=1):
            where = f"{path}, record {number}"
            record = checked(record, {"question_id": ID, "image": str, "text": str, "label": str}, where, "POPE")
            if record["label"] not in ("yes", "no"):
                raise UsageError(f"{where} is not a POPE record: the label is {record['label']!r}, not yes or no.")
            target = {"answer": record["label"], "subset": subset}
            # Ids restart in each subset.
            question_id = f"{subset}/{record['question_id']}"
            fields = {"question": record["text"]}
            questions.append(self.question(where, question_id, fields, target, stratum=subset, image=record["image"]))
        return questions

    def parse(self, text: str, target: Mapping[str, Any]) -> str:
        # The likelihood variant's text is one of the choices, in whatever words; other text is parsed.
        return {self.choices[0]: "yes", self.choices[1]: "no"}.get(text) or parse_pope(text)

    def is_invalid(self, prediction: Prediction) -> bool:
        return not says_yes_or_no(prediction.text) and prediction.text not in self.choices

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        rates = {
            subset: yes_no_rates([p.answer for p in part], [p.target["answer"] for p in part])
            for subset, part in by_part(predictions, "subset").items()
        }
        for name in ("accuracy", "f1", "precision", "recall", "yes_ratio"):
            values = {subset: 100 * own[name] for subset, own in rates.items()}
            metrics[name] = fmean(values.values())
            metrics |= {f"{name}/{subset}": value for subset, value in values.items()}
        return metrics

    def strata(self, predictions: Sequence[Prediction]) -> dict[str, list[float]]:
        return {subset: [100 * p.score for p in part] for subset, part in by_part(predictions, "subset").items()}

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return list(self.choices)
