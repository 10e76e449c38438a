"""Reading and checking annotation files, and the base class of benchmarks with ten annotators.

Every error names the file and the first offending record.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from prism_deco.errors import UsageError
from prism_deco.evaluation.base import Benchmark
from prism_deco.evaluation.items import Prediction, by_part, mean_score, most_common
from prism_deco.evaluation.metrics.vqa import VQAScore

Kind = type | tuple[type, ...]
ID: Kind = (int, str)


def read_text(path: Path) -> str:
    """The content of a UTF-8 file."""
    try:
        return path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(f"{path} does not exist: check root=FOLDER.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file ({error}).") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return _parse_json(read_text(path), f"{path}")


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file with one JSON value per line; blank lines are skipped."""
    # Not splitlines(), which also splits at separators such as U+2028 that a JSON string may contain.
    lines = enumerate(read_text(path).split("\n"), start=1)
    return [_parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also for numbers of thousands of digits
        raise UsageError(f"{where} is not complete JSON ({error}): download the file again.") from error


class _DataUnpickler(pickle.Unpickler):
    """Loads no class and no function, only built-in containers, strings and numbers."""

    def find_class(self, module_name: str, global_name: str, /) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}")


def load_data_pickle(path: Path) -> Any:
    """The content of a pickle of plain containers, strings and numbers. Classes and functions, which unpickling could
    execute, are refused."""
    try:
        with path.open("rb") as file:
            # The encoding is for the byte strings of pickles written by Python 2.
            return _DataUnpickler(file, encoding="utf-8").load()
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    except Exception as error:  # a damaged pickle can raise almost any exception
        raise UsageError(
            f"{path} is not a pickle of plain data ({type(error).__name__}: {error}). Nothing in it was executed; "
            "download it from its publisher again."
        ) from error


def checked(value: Any, fields: Mapping[str, Kind], where: str, what: str) -> dict[str, Any]:
    """Checks that `value` is a record with these fields and types, and returns it.

    Args:
        where: the file and the record's position in it, for errors.
        what: the benchmark whose record it should be, for errors.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a {what} record: it is a {type(value).__name__}, not an object.")
    for field, kind in fields.items():
        if field not in value:
            raise UsageError(f"{where} is not a {what} record: it has no {field!r} (it has {_some(value)}).")
        # Bools are refused by themselves, as they are ints to isinstance.
        if not isinstance(value[field], kind) or isinstance(value[field], bool):
            raise UsageError(f"{where} is not a {what} record: {field!r} is {_short(value[field])}.")
    return value


def checked_list(value: Any, fields: Mapping[str, Kind], path: Path, what: str) -> list[dict[str, Any]]:
    """Checks that `value` is a non-empty list of such records, and returns it."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{path} is not a {what} file: expected a list of records, found {_short(value)}.")
    return [checked(record, fields, f"{path}, record {k}", what) for k, record in enumerate(value, start=1)]


def read_records(path: Path, key: str, fields: Mapping[str, Kind], what: str) -> list[dict[str, Any]]:
    """The non-empty list of records under a key of a JSON object."""
    content = checked(read_json(path), {key: list}, str(path), what)
    return checked_list(content[key], fields, path, what)


def index_unique(records: Iterable[dict[str, Any]], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    """Records by the value of `key`; `UsageError` if a value occurs twice."""
    index: dict[Any, dict[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        # `setdefault` returns the earlier record if there is one.
        if index.setdefault(record[key], record) is not record:
            raise UsageError(f"{path}, record {number}: {key} {record[key]!r} occurs twice.")
    return index


def ten_answers(answers: Sequence[Any], where: str) -> list[str]:
    """The annotators' answers of a VQA record, given as strings or as `{answer: ...}`."""
    texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    strings = [text for text in texts if isinstance(text, str)]
    if len(texts) != 10 or len(strings) != 10:
        raise UsageError(f"{where}: VQA accuracy needs the answers of ten annotators, found {_short(answers)}.")
    return strings


def _some(record: Mapping[str, Any]) -> str:
    return ", ".join(list(map(str, record))[:8]) or "nothing"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class AnnotatorBenchmark(Benchmark):
    """Targets hold the annotators' `answers` and, if questions have types, the `type`."""

    target_keys = ("answers",)
    process: ClassVar[Callable[[str], str]]
    """The primary metric's processing of a prediction."""
    conventions: ClassVar[Mapping[str, VQAScore]]
    """Scoring functions by metric name, the primary metric's first."""

    def parse(self, text: str, target: Mapping[str, Any]) -> str:
        return type(self).process(text)

    def score(self, answer: Any, text: str, target: Mapping[str, Any]) -> float:
        return self.conventions[self.primary](text, target["answers"])

    def metrics(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        metrics = {self.primary: mean_score(predictions)}
        for name, score in self.conventions.items():
            if name != self.primary:
                scores = [score(p.text, p.target["answers"]) for p in predictions if p.output is not None]
                # Missing outputs add nothing to the sum, but count: they are wrong.
                metrics[name] = 100 * sum(scores) / len(predictions)
        if all("type" in p.target for p in predictions):
            parts = by_part(predictions, "type")
            metrics |= {f"{self.primary}/{part}": mean_score(members) for part, members in parts.items()}
        return metrics

    def constants(self, targets: Sequence[Mapping[str, Any]]) -> list[str]:
        return most_common(answer for target in targets for answer in target["answers"])
