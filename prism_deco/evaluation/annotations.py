"""Reading annotation files: every error names the file and the first offending record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_deco.errors import UsageError

Kind = type | tuple[type, ...]
ID: Kind = (int, str)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: is root right?") from error
    except (ValueError, RecursionError) as error:  # among them: no UTF-8, numbers of thousands of digits
        raise UsageError(f"{path} is not complete JSON ({error}): download it again.") from error


def read_json_lines(path: Path) -> list[Any]:
    """The records of a file with one JSON value per line; blank lines are skipped."""
    try:
        # Not splitlines(): it also splits at separators that may stand inside a JSON string.
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist: is root right?") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not a text file ({error}).") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is not complete JSON ({error}).") from error
    return records


def checked(value: Any, fields: Mapping[str, Kind], where: str, what: str) -> dict[str, Any]:
    """`value` as a record that has these fields with values of these types.

    Args:
        where: the file and the record's place in it.
        what: the benchmark whose record it should be.
    """
    if not isinstance(value, dict):
        raise UsageError(f"{where} is not a {what} record: it is a {type(value).__name__}, not an object.")
    for field, kind in fields.items():
        if field not in value:
            raise UsageError(f"{where} is not a {what} record: it has no {field!r} (it has {_some(value)}).")
        if not isinstance(value[field], kind) or isinstance(value[field], bool):
            raise UsageError(f"{where} is not a {what} record: {field!r} is {_short(value[field])}.")
    return value


def checked_list(value: Any, fields: Mapping[str, Kind], path: Path, what: str) -> list[dict[str, Any]]:
    """`value` as a non-empty list of such records."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{path} is not a {what} file: expected a list of records, found {_short(value)}.")
    return [checked(record, fields, f"{path}, record {k}", what) for k, record in enumerate(value, start=1)]


def index_unique(records: Iterable[dict[str, Any]], key: str, path: Path) -> dict[Any, dict[str, Any]]:
    """Records by the value of `key`; `UsageError` where it occurs twice."""
    index: dict[Any, dict[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        if index.setdefault(record[key], record) is not record:
            raise UsageError(f"{path}, record {number}: {key} {record[key]!r} occurs a second time.")
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
