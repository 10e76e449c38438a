"""What a sweep asks for: a YAML of `conf/sweep` and the arguments of the command line, as one `Spec`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_deco.config import choices, load_choice
from prism_deco.registry import unknown

LAUNCHERS = ("local", "slurm")
PARTS = ("name", "settings", "rows", "axes", "with", "jobs")
"""Keys of a sweep's YAML."""

FREE = ("trainer", "trainer.", "evaluate.", "recipe.micro_batch_size", "data.num_workers", "runs_dir")
"""Settings that say where and how a cell runs, not what it is: an unfinished run may continue under other ones."""

BENCHMARKS = "evaluate.benchmarks"
"""Its commas make one list: two cells that differ only in their scoring would be one training done twice."""


@dataclass(frozen=True)
class Row:
    """One line of a grid: settings that belong together, and the labels that tables call them by."""

    labels: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Spec:
    """A sweep: every row with every combination of the axes' values."""

    name: str
    settings: dict[str, str] = field(default_factory=dict)
    """Shared by all cells, as on the command line of `train`."""
    rows: list[Row] = field(default_factory=lambda: [Row()])
    axes: dict[str, list[str]] = field(default_factory=dict)
    """Values of each key that varies."""
    choices: dict[str, dict[str, str]] = field(default_factory=dict)
    """Settings that go with a choice: `projector=qformer` -> {`projector.heads`: `4`}."""
    jobs: int | None = None
    """Cells at a time on one machine; None leaves it to the launcher."""
    launcher: str = "local"
    slurm: dict[str, Any] = field(default_factory=dict)
    """Parameters of the SLURM jobs by submitit's names."""
    runs_dir: Path = Path("runs")

    @property
    def folder(self) -> Path:
        return self.runs_dir / self.name


def parse(arguments: Iterable[str]) -> Spec:
    """Reads the arguments of `prism-deco sweep`.

    Args:
        arguments: at most one name (a choice of `conf/sweep`, or the path of a YAML), and `key=value` pairs. A value
            with commas outside brackets and quotes is an axis. `name`, `runs_dir`, `launcher` and `slurm.*` are
            about the sweep; a label of the rows (`row=B1,B2`) selects rows; all others are settings of `train`.

    Raises:
        ValueError: an unknown sweep, a setting that the rows themselves set, or nothing to sweep over.
    """
    arguments = list(arguments)
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise ValueError(f"One sweep at a time: {' and '.join(names)} are names of sweeps, settings have key=value.")
    spec = _load(names[0]) if names else Spec(name="")
    own_name = None
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals:
            continue
        if key == "name":
            own_name = text
        elif key == "runs_dir":
            spec.runs_dir = Path(text)
        elif key == "launcher":
            if text not in LAUNCHERS:
                raise unknown("launcher", text, LAUNCHERS)
            spec.launcher = text
        elif key.startswith("slurm."):
            spec.slurm[key.removeprefix("slurm.")] = scalar(text)
        elif key == "run_id":
            raise ValueError("run_id is made for each cell of a sweep: name=NAME names the sweep's folder.")
        else:
            _set(spec, key, text)
    if not spec.axes and spec.rows == [Row()]:
        raise ValueError(
            "Nothing to sweep over: give a setting several values, for example projector=avgpool,c_abstractor, or name "
            f"a sweep: {', '.join(choices('sweep'))}."
        )
    spec.name = own_name or spec.name or _default_name(spec)
    return spec


def split_values(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and quotes: `a,[1,2]` -> `a`, `[1,2]`."""
    values, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            depth += (char in "[{(") - (char in "]})")
            if char == "," and depth == 0:
                values.append("")
                continue
        values[-1] += char
    return [value.strip() for value in values]


def scalar(text: str) -> Any:
    """A value of the command line as YAML reads it: `7` -> 7, `avgpool` -> "avgpool"."""
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index]


def is_free(key: str) -> bool:
    """Whether an unfinished cell may continue under another value of this key."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def _set(spec: Spec, key: str, text: str) -> None:
    values = [text] if key == BENCHMARKS else split_values(text)
    if "" in values and len(values) > 1:
        raise ValueError(f"{key}={text}: there is an empty value between the commas.")
    if any(key in row.labels for row in spec.rows):
        known = {str(row.labels[key]) for row in spec.rows if key in row.labels}
        for value in values:
            if value not in known:
                raise unknown(key, value, known)
        spec.rows = [row for row in spec.rows if str(row.labels.get(key)) in values]
        return
    if any(key in row.settings for row in spec.rows):
        labels = " ".join(spec.rows[0].labels)
        raise ValueError(f"{key} is what tells the rows of {spec.name} apart: choose rows with {labels}=NAME instead.")
    if len(values) > 1 or key in spec.axes:
        spec.settings.pop(key, None)
        spec.axes[key] = values
    else:
        spec.settings[key] = text


def _load(name: str) -> Spec:
    content = load_choice("sweep", name)
    for key in content:
        if key not in PARTS:
            raise unknown(f"key of the sweep {name}", key, PARTS)
    rows = content.get("rows") or [{}]
    return Spec(
        name=content["name"],
        settings=_texts(content.get("settings")),
        rows=[Row(row.get("labels") or {}, _texts(row.get("settings"))) for row in rows],
        axes={key: [_text(value) for value in values] for key, values in (content.get("axes") or {}).items()},
        choices={choice: _texts(settings) for choice, settings in (content.get("with") or {}).items()},
        jobs=content.get("jobs"),
    )


def _texts(settings: Mapping[Any, Any] | None) -> dict[str, str]:
    return {str(key): _text(value) for key, value in (settings or {}).items()}


def _text(value: Any) -> str:
    """A value of a YAML as one would write it on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _default_name(spec: Spec) -> str:
    """The axes' names and a digest of what they share: more values of an axis belong to the same sweep."""
    shared = json.dumps({key: value for key, value in spec.settings.items() if not is_free(key)}, sort_keys=True)
    names = [key.rpartition(".")[2] for key in spec.axes]
    return "-".join([*names, hashlib.sha256(shared.encode()).hexdigest()[:6]])
