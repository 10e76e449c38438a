"""The image questions of SEED-Bench: four options, nine types of questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import ID, checked, checked_list, read_json
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, by_part, mean_score
from prism_deco.evaluation.metrics.choice import parse_first_letter, parse_letter

LETTER = "{question}\n{options}\nAnswer with the option's letter from the given choices directly."
_WHAT = "SEED-Bench"
_RECORD = {
    "question_id": ID,
    "question": str,
    "choice_a": (str, int, float),
    "choice_b": (str, int, float),
    "choice_c": (str, int, float),
    "choice_d": (str, int, float),
    "answer": str,
    "data_id": str,
    "data_type": str,
    "question_type_id": int,
}


@BENCHMARKS.register("seed")
class SEED(Benchmark):
    """`SEED-Bench.json`: {questions: [...], question_type: {name: id}}; its video questions are skipped.

    `accuracy` only accepts the bare letter (LLaVA); `accuracy_lenient` takes the first character, in upper or lower
    case (lmms-eval).
    """

    VARIANTS: ClassVar = {"letter": Variant(LETTER)}
    target_keys = ("answer", "type")

    def read(self) -> list[Question]:
        path = self.annotation_path()
        content = checked(read_json(path), {"questions": list, "question_type": dict}, str(path), _WHAT)
        types = content["question_type"]
        # Inverts {name: id}, after a check that every id is a whole number.
        names = {number: name for name, number in checked(types, dict.fromkeys(types, int), str(path), _WHAT).items()}
        questions = []
        for number, record in enumerate(checked_list(content["questions"], _RECORD, path, _WHAT), start=1):
            if record["data_type"] != "image":
                continue
            where = f"{path}, record {number}"
            if record["answer"] not in tuple("ABCD") or record["question_type_id"] not in names:
                raise UsageError(f"{where} is not a SEED-Bench record: its answer or question_type_id is unknown.")
            options = "\n".join(f"{letter}. {record[f'choice_{letter.lower()}']}" for letter in "ABCD")
            fields = {"question": record["question"], "options": options}
            target = {"answer": record["answer"], "type": names[record["question_type_id"]]}
            questions.append(
                self.question(
                    where, record["question_id"], fields, target, stratum=target["type"], data_id=record["data_id"]
                )
            )
        return questions

    def parse(self, text: str, target: Mapping[str, Any]) -> str | None:
        return parse_letter(text, tuple("ABCD"))

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        lenient = sum(parse_first_letter(p.text, tuple("ABCD")) == p.target["answer"] for p in predictions)
        metrics = {"accuracy": mean_score(predictions), "accuracy_lenient": 100 * lenient / len(predictions)}
        return metrics | {f"accuracy/{kind}": mean_score(part) for kind, part in by_part(predictions, "type").items()}

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return list("ABCD")
