"""What VQAv2, VizWiz and TextVQA share: free answers compared with those of ten annotators."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from prism_deco.evaluation.base import Benchmark
from prism_deco.evaluation.items import Prediction, by_part, mean_score, most_common
from prism_deco.evaluation.metrics.vqa import VQAScore


class AnnotatorBenchmark(Benchmark):
    """Targets hold the `answers` of the annotators and, where there are kinds of questions, their `type`."""

    process: ClassVar[Callable[[str], str]]
    """How the primary convention rewrites a prediction."""
    conventions: ClassVar[Mapping[str, VQAScore]]
    """Scores by metric name; that of the primary comes first."""

    def parse(self, text: str, target: Mapping[str, Any]) -> str:
        return type(self).process(text)

    def score(self, answer: Any, text: str, target: Mapping[str, Any]) -> float:
        return self.conventions[self.primary](text, target["answers"])

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        metrics = {self.primary: mean_score(predictions)}
        for name, score in self.conventions.items():
            if name != self.primary:
                scores = [score(p.text, p.target["answers"]) for p in predictions if p.output is not None]
                metrics[name] = 100 * sum(scores) / len(predictions)
        if all("type" in p.target for p in predictions):
            parts = by_part(predictions, "type")
            metrics |= {f"{self.primary}/{part}": mean_score(members) for part, members in parts.items()}
        return metrics

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return most_common(answer for target in targets for answer in target["answers"])
