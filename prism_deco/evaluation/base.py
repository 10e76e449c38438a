"""The base class of benchmarks, the interface of the models they evaluate, and the registry of benchmarks."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor

from prism_deco.bootstrap import Combine
from prism_deco.config.registry import Registry, unknown
from prism_deco.data.images import resolve_image
from prism_deco.errors import UsageError
from prism_deco.evaluation.items import Item, Prediction, Question, Variant, cut, mean_score, most_common

ON_BAD_IMAGE = ("fail", "count_wrong")
SHORT = "{question}\nAnswer the question using a single word or phrase."  # LLaVA-1.5's short-answer prompt


class Model(Protocol):
    """A model under evaluation."""

    def generate(self, images: list[Tensor | list[Tensor]], prompts: list[str], max_new_tokens: int) -> list[str]:
        """Greedy answers to raw questions.

        Args:
            images: per question the output of `encode_images` for its image; a list of them if it has several or none.
        """
        ...

    def encode_images(self, images: list[Path]) -> list[Tensor]:
        """Visual tokens float[M, D] of each image."""
        ...

    def choice_probabilities(
        self, images: list[Tensor | list[Tensor]], prompts: list[str], choices: list[str]
    ) -> Tensor:
        """float[prompts, choices]: softmax over the choices at the first answer token."""
        ...


class Benchmark(ABC):
    """Reads a benchmark's official files, asks its questions, parses the answers and scores them.

    Subclasses implement `read` and `parse`, and override what differs from the mean of exact matches.
    Item scores are in 0..1; metrics are in the paper's unit: per cent, or MME's sums.

    Args:
        name: the benchmark's name (the file name of its YAML).
        root: folder that all other paths are relative to.
        variants: the ways to ask, a subset of `VARIANTS`. The first one's metrics have plain names ("accuracy"), the
            others' are prefixed ("generate/accuracy").
        annotations: path of the questions' file; a pattern with a field if there are several.
        image: pattern of an image's path; its fields are those of the annotations, and `{split}`. Empty if the
            annotation file contains the images.
        split: replaces `{split}` in paths.
        max_new_tokens: length limit of an answer in tokens.
        on_bad_image: what to do about a missing or unreadable image: fail | count_wrong.
        limit: ask only this many questions, spread over subsets; None asks all.
    """

    VARIANTS: ClassVar[Mapping[str, Variant]]
    primary: ClassVar[str] = "accuracy"
    """Name of the primary metric, which is the paper's."""
    target_keys: ClassVar[Sequence[str]] = ()
    """Keys of every question's target. Predictions without them are another benchmark's, and cannot be scored."""
    combine: ClassVar[Combine] = "mean"
    """How the primary metric combines the means of the `strata`."""
    choices: Sequence[str] = ()
    """The answers that a likelihood variant compares."""
    parts: Sequence[str] = ()
    """The strata that the YAML names, if any. Each needs questions: the primary metric would silently omit it."""

    def __init__(
        self,
        *,
        name: str,
        root: str | Path | None,
        variants: Sequence[str],
        annotations: str = "",
        image: str = "",
        split: str = "",
        max_new_tokens: int = 128,
        on_bad_image: str = "fail",
        limit: int | None = None,
    ):
        for variant in variants:
            if variant not in self.VARIANTS:
                raise unknown(f"variant of {name}", variant, self.VARIANTS)
        if not variants or len(set(variants)) < len(variants):
            raise UsageError(f"{name}: variants must name one or more of {', '.join(self.VARIANTS)}, each once.")
        if on_bad_image not in ON_BAD_IMAGE:
            raise unknown("on_bad_image", on_bad_image, ON_BAD_IMAGE)
        if limit is not None and limit < 1:
            raise UsageError(f"{name}: limit={limit} would ask no questions; null asks all of them.")
        self.name = name
        self.root = Path(root).expanduser() if root is not None else None
        self.annotations = annotations
        self.image = image
        self.split = split
        self.variants = tuple(variants)
        self.max_new_tokens = max_new_tokens
        self.on_bad_image = on_bad_image
        self.limit = limit

    @abstractmethod
    def read(self) -> list[Question]:
        """All questions, in the files' order.

        Raises:
            UsageError: a file is missing, damaged or another benchmark's; names it and the first bad record.
        """

    @abstractmethod
    def parse(self, text: str, target: Mapping[str, Any]) -> Any:
        """Parses a stripped output into an answer, as JSON; None if it cannot be parsed."""

    def score(self, answer: Any, text: str, target: Mapping[str, Any]) -> float:
        """Score 0..1 of a parsed answer; by default, whether it equals the target's."""
        return float(answer == target["answer"])

    def is_invalid(self, prediction: Prediction) -> bool:
        """Whether the output could not be parsed as an answer, or is empty."""
        return prediction.answer is None or prediction.answer == ""

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """All metrics of one variant's graded predictions."""
        return {"accuracy": mean_score(predictions)}

    def strata(self, predictions: Sequence[Prediction]) -> dict[str, list[float]]:
        """By stratum, the values that the bootstrap resamples, in the unit of the primary metric."""
        return {"all": [100 * prediction.score for prediction in predictions]}

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        """Candidate outputs for the best constant answer, which needs no image."""
        return most_common(str(target["answer"]) for target in targets)

    def grade(self, prediction: Prediction) -> Prediction:
        """The prediction with `answer` and `score` computed from its output; no output scores 0."""
        if prediction.output is None:
            return replace(prediction, answer=None, score=0.0)
        text = prediction.text
        probabilities = _probabilities(text)
        if self.VARIANTS[self.variant_of(prediction)].likelihood:
            if probabilities is None:
                raise self._other_variant(prediction, "text, not probabilities", likelihood=False)
            text = max(probabilities, key=probabilities.__getitem__)  # the first of ties, like argmax
        elif probabilities is not None and set(probabilities) == set(self.choices):
            raise self._other_variant(prediction, "probabilities, not text", likelihood=True)
        answer = self.parse(text, prediction.target)
        score = 0.0 if answer is None else self.score(answer, text, prediction.target)
        return replace(prediction, answer=answer, score=score)

    def variant_of(self, prediction: Prediction) -> str:
        """The variant that a prediction belongs to."""
        name = prediction.target.get("variant", self.variants[0])
        if name not in self.VARIANTS:
            raise unknown(f"variant of {self.name}", str(name), self.VARIANTS)
        return name

    def select(self) -> list[Question]:
        """The questions to ask, in the files' order, at least one of each of the `parts`; ids are unique."""
        questions = self.read()
        if not questions:
            raise UsageError(f"{self.name}: there are no questions of split {self.split!r} in {self.root}.")
        self.check_parts(Counter(question.stratum for question in questions), f"the files in {self.root}")
        for question in questions:
            _check_encoding(question, f"{self.name}, in {self.root}")
        # If any id is repeated, so is the most common one.
        question_id, count = Counter(question.question_id for question in questions).most_common(1)[0]
        if count > 1:
            raise UsageError(f"{self.name}: the question id {question_id} occurs twice in {self.root}.")
        # After the checks, which concern the files as a whole and not only what the limit keeps.
        questions = cut(questions, self.limit)
        self.check_parts(Counter(question.stratum for question in questions), f"what limit={self.limit} keeps")
        return questions

    def items(self) -> list[Item]:
        """The questions of `select` as each variant asks them, variant by variant: the canonical order."""
        questions = self.select()
        return [self._ask(question, name) for name in self.variants for question in questions]

    def check_parts(self, counts: Mapping[str, int], where: str) -> None:
        """Raises `UsageError` if one of the parts has no questions in `counts` (by stratum); `where` says in what."""
        if empty := [part for part in self.parts if not counts.get(part)]:
            found = ", ".join(f"{part}: {counts.get(part, 0)}" for part in self.parts)
            raise UsageError(f"{self.name}: no questions of {' and '.join(empty)} in {where} (questions of {found}).")

    def annotation_path(self, **fields: Any) -> Path:
        """The file of the questions; `fields` fill in its pattern."""
        if not self.annotations:
            raise UsageError(f"The benchmark {self.name} is missing the key annotations.")
        return self.path(self.annotations, **fields)

    def path(self, pattern: str, **fields: Any) -> Path:
        """Fills in a pattern to a path below the root; `UsageError` if it leaves the root."""
        if self.root is None:
            raise UsageError(f"{self.name} needs a folder with its files: set root=<folder>.")
        try:
            name = pattern.format(split=self.split, **fields)
        except (KeyError, IndexError, ValueError) as error:
            raise UsageError(
                f"{self.name}: the path pattern {pattern!r} does not fit the fields {', '.join(fields) or 'split'} "
                f"({type(error).__name__}: {error})."
            ) from error
        return resolve_image(self.root, name)

    def question(
        self,
        where: str,
        question_id: Any,
        fields: Mapping[str, str],
        target: dict[str, Any],
        *,
        stratum: str = "",
        group: str = "",
        **image: Any,
    ) -> Question:
        """Builds a question about one image; `image` fills in the pattern, and `where` is as for `image_file`."""
        name, path = self.image_file(where, **image)
        return Question(str(question_id), (name,), (path,), fields, target, stratum=stratum, group=group)

    def image_file(self, where: str, **fields: Any) -> tuple[str, Path]:
        """Fills in the pattern of images: the path below the root, as predictions record it, and the file.

        `where` is the annotation file and the record, for errors.
        """
        try:
            path = self.path(self.image, **fields)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from error
        assert self.root is not None
        return path.relative_to(self.root).as_posix(), path

    def _other_variant(self, prediction: Prediction, found: str, *, likelihood: bool) -> UsageError:
        fitting = [name for name, variant in self.VARIANTS.items() if variant.likelihood == likelihood]
        return UsageError(
            f"{self.name}: the output of question {prediction.question_id} is {found}. The variant "
            f"{self.variant_of(prediction)} cannot have produced it: set variants=[{' or '.join(fitting)}]."
        )

    def _ask(self, question: Question, name: str) -> Item:
        variant = self.VARIANTS[name]
        # Only if a question is asked in several ways does its id, and its target, name the variant.
        several = len(self.variants) > 1
        return Item(
            question_id=f"{question.question_id}/{name}" if several else question.question_id,
            images=question.images,
            paths=question.paths,
            prompt=variant.template.format(**question.fields),
            target=question.target | ({"variant": name} if several else {}),
            choices=tuple(self.choices) if variant.likelihood else (),
        )


def _check_encoding(question: Question, where: str) -> None:
    """Raises `UsageError` for lone surrogates, which JSON can escape but no file and no tokenizer accepts."""
    content = [question.question_id, question.images, *question.fields.values(), question.target]
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{where}: question {question.question_id!a} holds half a surrogate pair, which is not a character: "
            "correct the file."
        ) from error


def _probabilities(text: str) -> dict[str, float] | None:
    """The output of a likelihood variant, probabilities by choice; None for other text."""
    if not text.startswith("{"):
        return None
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    is_table = isinstance(content, dict) and content and all(isinstance(p, float) for p in content.values())
    return content if is_table else None


BENCHMARKS: Registry[type[Benchmark]] = Registry("benchmark family", package="prism_deco.evaluation")
