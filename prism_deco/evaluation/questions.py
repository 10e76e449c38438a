"""The user's own questions, in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, checked, read_json_lines
from prism_deco.evaluation.base import BENCHMARKS, SHORT, Benchmark
from prism_deco.evaluation.items import Question, Variant, most_common
from prism_deco.evaluation.metrics.exact import strip_trailing_period

_WHAT = "question"
_FIELDS = {"question": str, "image": (str, list, NoneType), "answer": (str, int, float, list)}


@BENCHMARKS.register("questions")
class Questions(Benchmark):
    """JSON lines {question, image, answer}.

    `image` is a path, a list of paths, or null for a text-only question. `answer` is a text, or a list of texts, all
    of them correct. `question_id` is optional and defaults to the number of the line. An output is correct if it equals
    one of the answers, ignoring case and a period at the end.

    Variants: `short` asks for a single word or phrase, `plain` asks the question as it is.
    """

    VARIANTS: ClassVar = {"short": Variant(SHORT), "plain": Variant("{question}")}
    target_keys = ("answers",)

    def read(self) -> list[Question]:
        path = self.annotation_path()
        return [self._question(record, f"{path}, record {k}", k) for k, record in enumerate(read_json_lines(path), 1)]

    def _question(self, record: Any, where: str, number: int) -> Question:
        # A text-only question needs `"image": null`, so that an image under a misspelt key is not overlooked.
        checked(record, _FIELDS, where, _WHAT)
        images = _listed(record["image"])
        answers = [str(answer) if type(answer) in (int, float) else answer for answer in _listed(record["answer"])]
        if not answers or not all(isinstance(text, str) for text in (*images, *answers)):
            raise UsageError(f"{where}: image and answer must be text or lists of texts.")
        files = [self.image_file(where, image=image) for image in images]
        question_id = checked({"question_id": number} | record, {"question_id": ID}, where, _WHAT)["question_id"]
        return Question(
            question_id=str(question_id),
            images=tuple(name for name, _ in files),
            paths=tuple(path for _, path in files),
            fields={"question": record["question"]},
            target={"answers": answers},
        )

    def parse(self, text: str, target: Mapping[str, Any]) -> str:
        return strip_trailing_period(text).strip()

    def score(self, answer: Any, text: str, target: Mapping[str, Any]) -> float:
        return float(answer in [self.parse(accepted, target) for accepted in target["answers"]])

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return most_common(answer for target in targets for answer in target["answers"])


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
