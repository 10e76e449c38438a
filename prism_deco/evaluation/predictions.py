"""`predictions.jsonl`: appended to during an evaluation, resumed after a crash, sorted at the end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from prism_deco.config.schema import AS_TRAINED
from prism_deco.errors import UsageError
from prism_deco.evaluation.items import Item, Prediction
from prism_deco.files import read_json, refusals_named, write_json, write_whole

FILE = "predictions.jsonl"
VARIANTS = "variants"
ASK = "ask"
"""Keys of `decoding.json`: the variants of the questions, and how the model was prompted (`LanguageModel.ask`)."""
_FIELDS = frozenset(field.name for field in fields(Prediction))


def load_predictions(path: str | Path) -> list[Prediction]:
    """The predictions of a file, at least one; question ids are unique."""
    path = Path(path)
    try:
        predictions = _read(path, drop_torn=False)
    except FileNotFoundError as error:
        raise UsageError(f"{path} does not exist.") from error
    if not predictions:
        raise UsageError(f"{path} holds no predictions.")
    question_id, count = Counter(prediction.question_id for prediction in predictions).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path}: question {question_id} occurs twice.")
    return predictions


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes predictions as JSON Lines, as `write_whole` does."""
    write_whole(path, "".join(map(_line, predictions)))


class PredictionStore:
    """The predictions of a running evaluation, one file per rank.

    Args:
        folder: where they are written, and where an earlier evaluation may have left some.
        items: all items, in canonical order.
        decoding: the decoding settings. Kept in `decoding.json`, so that answers of different settings are not mixed.
        rank, world: this process's rank and the number of processes; a single one writes the final file directly.

    Attributes:
        done: predictions so far, by question id. Those that an earlier evaluation made without an output, because the
            image was missing or unreadable, are not included: they are asked again.
    """

    def __init__(self, folder: Path, items: Sequence[Item], decoding: Mapping[str, Any], rank: int = 0, world: int = 1):
        self.folder = folder
        self.items = {item.question_id: item for item in items}
        folder.mkdir(parents=True, exist_ok=True)
        self._check_decoding(dict(decoding), write=rank == 0)
        names = [FILE] if world == 1 else [f"predictions.rank{k}.jsonl" for k in range(world)]
        self._files = [folder / name for name in names]
        self._own = self._files[rank]
        self.done: dict[str, Prediction] = {}
        # The final file and those of ranks, as the earlier evaluation may have had another number of processes.
        for path in sorted(folder.glob("predictions*.jsonl")):
            predictions = _read(path, drop_torn=True)
            for prediction in predictions:
                self._check(prediction, path, len(predictions))
                if prediction.output is not None:
                    self.done[prediction.question_id] = prediction

    def has_all(self, items: Iterable[Item]) -> bool:
        """Whether all items have been answered."""
        return all(item.question_id in self.done for item in items)

    def start(self, kept: Container[str]) -> None:
        """Starts this rank's file with the earlier answers to the questions `kept`; drops the others."""
        self.done = {name: prediction for name, prediction in self.done.items() if name in kept}
        write_predictions(self._own, self.done.values())

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Writes predictions immediately, so that a killed process loses no finished batch."""
        with self._own.open("a", encoding="utf-8") as file:
            for prediction in predictions:
                file.write(_line(prediction))
                self.done[prediction.question_id] = prediction

    def merge(self) -> list[Prediction]:
        """Writes all predictions to the final file, in canonical order, and removes the ranks' files."""
        found = {}
        for path in self._files:
            found |= {prediction.question_id: prediction for prediction in _read(path, drop_torn=True)}
        ordered = [found[question_id] for question_id in self.items]
        write_predictions(self.folder / FILE, ordered)
        for path in self.folder.glob("predictions.rank*.jsonl"):
            path.unlink()
        return ordered

    def _check_decoding(self, decoding: dict[str, Any], write: bool) -> None:
        path = self.folder / "decoding.json"
        if any(self.folder.glob("predictions*.jsonl")):
            if not path.is_file():
                raise UsageError(f"{self.folder} holds answers, but no {path.name} with their settings. {self._ways}")
            # A setting that the file lacks cannot be compared, except ASK, which defaults to AS_TRAINED.
            before = {ASK: AS_TRAINED} | read_json(path)
            now = {ASK: AS_TRAINED} | decoding
            changed = [f"{k} was {old} and is {now.get(k)}" for k, old in before.items() if old != now.get(k)]
            if changed:
                raise UsageError(f"{self.folder} holds answers of other settings: {', '.join(changed)}. {self._ways}")
        if write:
            write_json(path, decoding)

    def _check(self, prediction: Prediction, path: Path, count: int) -> None:
        item = self.items.get(prediction.question_id)
        if item is None:
            raise UsageError(
                f"{path} holds {count} answers, one of them to the question {prediction.question_id}, which is not one "
                f"of the {len(self.items)} that this evaluation asks (another benchmark, split or limit). {self._ways}"
            )
        for name in ("image", "prompt", "target"):
            old, new = getattr(prediction, name), getattr(item, name)
            if old != new:
                raise UsageError(
                    f"{path} holds answers to other questions: the {name} of question {prediction.question_id} was "
                    f"{old!r} and is {new!r}. {self._ways}"
                )

    @property
    def _ways(self) -> str:
        return f"Choose another folder (prism-deco evaluate --out DIR), or delete {self.folder}."


def _line(prediction: Prediction) -> str:
    return json.dumps(asdict(prediction), ensure_ascii=False) + "\n"


def _read(path: Path, drop_torn: bool) -> list[Prediction]:
    """The predictions of a file.

    Args:
        drop_torn: ignore a last line without a newline, whose write was interrupted.
    """
    with refusals_named(path, "Name a predictions.jsonl."):
        content = path.read_bytes()
    if drop_torn:
        # Up to the last newline; nothing if there is none.
        content = content[: content.rfind(b"\n") + 1]
    predictions = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise UsageError(f"{path}, line {number} is damaged ({error}): remove the line.") from error
        if not isinstance(record, dict) or _FIELDS - record.keys() or not isinstance(record["target"], dict):
            raise UsageError(f"{path}, line {number} is not a prediction: it needs {', '.join(sorted(_FIELDS))}.")
        if not isinstance(record["output"], str | None):
            raise UsageError(f"{path}, line {number}: `output` must be text or null.")
        predictions.append(Prediction(**{name: record[name] for name in _FIELDS}))
    return predictions
