"""MME: pairs of yes/no questions about an image, one with the answer yes and one with no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from prism_deco.errors import UsageError
from prism_deco.evaluation.annotations import read_text
from prism_deco.evaluation.base import BENCHMARKS, SHORT, Benchmark
from prism_deco.evaluation.items import Prediction, Question, Variant, by_part, mean_score
from prism_deco.evaluation.metrics.yesno import mme_pairs, mme_score, parse_mme

_SUFFIX = "Please answer yes or no."
_IMAGES = (".jpg", ".jpeg", ".png")


@BENCHMARKS.register("mme")
class MME(Benchmark):
    """The release's folder per task (the field `{task}` of `annotations`), with one text file per image: two lines
    `question <tab> Yes|No`.

    Text files are next to the images, or (in five of the tasks) in `questions_answers_YN/`, with the images in
    `images/`. The score of a task is 100 accuracy + 100 accuracy+ (both questions of an image correct), that of the
    benchmark the sum over tasks: at most 2000 for the ten perception tasks.

    Args:
        tasks: names of the tasks.
    """

    VARIANTS: ClassVar = {"short": Variant(SHORT)}
    target_keys = ("answer", "task")
    primary = "score"
    combine = "sum"

    def __init__(self, *, tasks: Sequence[str], **common: Any):
        super().__init__(**common)
        self.parts = tuple(tasks)

    def read(self) -> list[Question]:
        return [question for task in self.parts for question in self._read_task(task)]

    def _read_task(self, task: str) -> list[Question]:
        folder = self.annotation_path(task=task)
        texts = folder / "questions_answers_YN" if (folder / "questions_answers_YN").is_dir() else folder
        files = sorted(texts.glob("*.txt"))
        if not files:
            raise UsageError(f"{texts} holds no question files of the MME task {task}: check root.")
        inner = "images/" if texts != folder else ""
        questions = []
        for file in files:
            name = inner + _image_name(folder / inner, file.stem)
            for number, (question, answer) in enumerate(_read_pair(file)):
                questions.append(
                    self.question(
                        str(file),
                        f"{task}/{file.stem}/{number}",
                        {"question": question},
                        {"answer": answer, "task": task},
                        stratum=task,
                        group=f"{task}/{file.stem}",
                        task=task,
                        name=name,
                    )
                )
        return questions

    def parse(self, text: str, target: Mapping[str, Any]) -> str | None:
        return parse_mme(text)

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        metrics = {"score": 0.0, "accuracy": mean_score(predictions)}
        for task, part in by_part(predictions, "task").items():
            accuracy, plus = mme_score(*_correct(part))
            metrics |= {f"accuracy/{task}": 100 * accuracy, f"accuracy_plus/{task}": 100 * plus}
            metrics[f"score/{task}"] = 100 * accuracy + 100 * plus
            metrics["score"] += metrics[f"score/{task}"]
        return metrics

    def strata(self, predictions: Sequence[Prediction]) -> dict[str, list[float]]:
        strata = {}
        for task, part in by_part(predictions, "task").items():
            pairs = mme_pairs(*_correct(part))
            # Scaled so that the mean over images of `right` is the accuracy over questions.
            share = 100 * len(pairs) / len(part)
            strata[task] = [share * right + 100 * both for right, both in pairs]
        return strata

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return ["Yes", "No"]


def _correct(predictions: Sequence[Prediction]) -> tuple[list[bool], list[str]]:
    return [p.score == 1 for p in predictions], [str(p.image) for p in predictions]


def _image_name(folder: Path, stem: str) -> str:
    """The name of a text file's image; if there is none, a name that does not exist."""
    # The missing file is then handled like any other missing image (`on_bad_image`).
    return next((stem + suffix for suffix in _IMAGES if (folder / (stem + suffix)).is_file()), stem + _IMAGES[0])


def _read_pair(file: Path) -> list[tuple[str, str]]:
    lines = [line for line in read_text(file).splitlines() if line.strip()]
    if len(lines) != 2:
        raise UsageError(f"{file} holds {len(lines)} questions; MME has two per image.")
    pairs = []
    for line in lines:
        question, _, answer = line.rpartition("\t")
        if not question or answer.strip().lower() not in ("yes", "no"):
            raise UsageError(f"{file}: {line!r} is not an MME line `question <tab> Yes|No`.")
        pairs.append((question.strip().removesuffix(_SUFFIX).strip(), answer.strip().lower()))
    return pairs
