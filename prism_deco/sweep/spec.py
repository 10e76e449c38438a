"""The definition of a sweep (`Spec`), read from a YAML of `conf/sweep` and the command line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_deco.config import GROUPS, choices, is_free, load_choice, parse_value, read_yaml
from prism_deco.config.choices import YAML_SUFFIXES, choice_name
from prism_deco.config.registry import unknown
from prism_deco.config.schema import NAME_LISTS, Config
from prism_deco.errors import UsageError

LAUNCHERS = ("local", "slurm")
KEYS = ("name", "settings", "rows", "axes", "with", "jobs", "parts", "one_table", "controls")
"""Keys of a sweep's YAML."""

PART_KEYS = ("settings", "rows", "axes", "choose")
"""Keys of a part of a sweep."""

PART = "part"
"""The label that holds the part of a sweep that a cell belongs to."""

SLURM_NOT_TEXT = (
    "time", "nodes", "ntasks_per_node", "cpus_per_task", "cpus_per_gpu", "num_gpus", "gpus_per_node", "gpus_per_task",
    "setup", "teardown", "signal_delay_s", "exclusive", "array_parallelism", "stderr_to_stdout", "map_count",
    "additional_parameters", "srun_args", "use_srun",
)  # fmt: skip
"""submitit's options that are parsed as YAML: numbers, switches and lists. Others stay text: an account may be 007."""


@dataclass(frozen=True)
class SweepRow:
    """One row of a grid: settings that belong together, and their labels in tables."""

    labels: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass
class RunGrid:
    """Every row with every combination of the axes' values."""

    name: str = ""
    """The part's name; empty if the sweep has no parts."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings shared by all cells, as on the command line of `train`."""
    rows: list[SweepRow] = field(default_factory=lambda: [SweepRow()])
    axes: dict[str, list[str]] = field(default_factory=dict)
    """Values of each key that varies."""
    choose: dict[str, str] = field(default_factory=dict)
    """Keys whose value is chosen by the results of an earlier part: {`recipe.lr`: `ladder`} (see `select`)."""


@dataclass
class Spec:
    """A sweep: one grid of cells, or several grids, which are its parts."""

    name: str
    grids: list[RunGrid] = field(default_factory=lambda: [RunGrid()])
    choices: dict[str, dict[str, str]] = field(default_factory=dict)
    """Settings that go with a choice: `projector=qformer` -> {`projector.heads`: `4`}."""
    one_table: bool = False
    """Whether the cells of all parts share one table; they then have no `part` label."""
    controls: list[str] = field(default_factory=list)
    """Labels of the projectors that others are measured against; figures draw them as a band."""
    jobs: int | None = None
    """Cells at a time on one machine; None is the launcher's default."""
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
            with commas outside brackets and quotes is an axis, and `key+=value` adds to one. `name`, `runs_dir`,
            `launcher`, `slurm.*` and `controls` concern the sweep; a label of the rows (`row=B1,B2`) selects rows; all
            others are settings of `train`.

    Raises:
        UsageError: an unknown sweep, a setting that the rows themselves set, or nothing to sweep over.
    """
    # `key+=value` comes last, since it adds to what `key=value` sets.
    arguments = sorted(arguments, key=lambda argument: argument.partition("=")[0].endswith("+"))
    names = [argument for argument in arguments if "=" not in argument]
    if len(names) > 1:
        raise UsageError(
            f"One sweep at a time: {' and '.join(names)} are names of sweeps; settings are written key=value."
        )
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
            option = key.removeprefix("slurm.")
            spec.slurm[option] = parse_value(key, text, is_text=option not in SLURM_NOT_TEXT)
        elif key in ("controls", "controls+"):
            named = [choice_name(value) for value in split_values(text.strip("[]"))]
            spec.controls = [*(spec.controls if key.endswith("+") else []), *named]
        elif key == "run_id":
            raise UsageError("run_id is generated for each cell of a sweep: name=NAME sets the name of its folder.")
        else:
            _set(spec, key, text)
    if all(not grid.axes and grid.rows == [SweepRow()] for grid in spec.grids):
        raise UsageError(
            "Nothing to sweep over: give a setting several values, for example projector=avgpool,c_abstractor, or name "
            f"a sweep: {', '.join(choices('sweep'))}."
        )
    spec.name = own_name or spec.name or _default_name(spec)
    return spec


def is_sweep(arguments: Iterable[str]) -> bool:
    """Whether arguments describe several runs: the name or YAML of a sweep, or several values of a key."""
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if equals and key not in NAME_LISTS and len(split_values(text)) > 1:
            return True
        if not equals and not (argument.endswith(YAML_SUFFIXES) and _is_configuration(Path(argument))):
            return True
    return False


def _is_configuration(path: Path) -> bool:
    """Whether a YAML configures a single run; a sweep's has rows, axes or parts."""
    return path.is_file() and not {"rows", "axes", "parts"} & read_yaml(path).keys()


def split_values(text: str) -> list[str]:
    """Splits at the commas that stand outside brackets and quotes: `a,[1,2]` -> `a`, `[1,2]`."""
    values = [""]
    depth = 0  # of open brackets
    quote = ""  # the one that is open
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        else:
            # 1 more after an opening bracket, 1 less after a closing one.
            depth += (char in "[{(") - (char in "]})")
            if char == "," and depth == 0:
                values.append("")
                continue
        values[-1] += char
    return [value.strip() for value in values]


def _set(spec: Spec, key: str, text: str) -> None:
    adds = key.endswith("+")
    key = key.removesuffix("+")
    # Lists of benchmarks are no axis: cells that differ only in their scoring would repeat the same training.
    values = [text] if key in NAME_LISTS else split_values(text)
    if "" in values and len(values) > 1:
        raise UsageError(f"{key}={text} has an empty value between commas.")
    rows = [row for grid in spec.grids for row in grid.rows]
    # A key without a dot is a field of the configuration, or a label of the rows.
    if "." not in key and key not in Config.__dataclass_fields__ and not any(key in row.labels for row in rows):
        own = {label for row in rows for label in row.labels}
        raise unknown("key of a sweep", key, {*Config.__dataclass_fields__, "name", "launcher", *own})
    swept = [grid for grid in spec.grids if key in grid.axes]
    if adds:
        if not swept:
            raise UsageError(f"{key}+={text} adds to an axis, and nothing is swept over {key} so far: write {key}=...")
        for grid in swept:
            grid.axes[key] = [*grid.axes[key], *values]
        return
    # The label of a row selects rows, and in parts that have it as an axis, values of that axis.
    if known := {str(row.labels[key]) for row in rows if key in row.labels}:
        others = [value for value in values if value not in known]
        if others and not swept:
            raise unknown(key, others[0], known)
        for grid in spec.grids:
            if grid in swept:
                # In the given order, the values that this axis has, and new ones, which no row is named by.
                grid.axes[key] = [value for value in values if value in grid.axes[key] or value in others]
            else:
                grid.rows = [row for row in grid.rows if str(row.labels.get(key)) in values]
        # A part from which nothing was selected is dropped.
        spec.grids = [grid for grid in spec.grids if grid.rows and all(grid.axes.values())]
        return
    if any(key in row.settings for row in rows):
        labels = " ".join(spec.grids[0].rows[0].labels)
        raise UsageError(f"{key} distinguishes the rows of {spec.name}: select rows with {labels}=NAME instead.")
    grids = spec.grids
    if len(values) > 1:  # parts that sweep the key already, or else all
        grids = [grid for grid in grids if key in grid.axes] or grids
    for grid in grids:
        if len(values) > 1 or key in grid.axes:
            grid.settings.pop(key, None)
            grid.axes[key] = values
        else:
            grid.settings[key] = text


def _load(name: str) -> Spec:
    content = load_choice("sweep", name)
    own = content.keys() - {"name"}
    # It has only keys of a run's configuration: probably meant for `train`.
    if own and own <= Config.__dataclass_fields__.keys():
        raise UsageError(
            f"{name} configures one run, which `prism-deco train {name}` trains. The YAML of a sweep has `axes` or "
            "`rows`, and what its cells share under `settings`."
        )
    _check_keys(f"key of the sweep {name}", content, KEYS)
    parts: Mapping[str, Any] = content.get("parts") or {}
    if parts and (content.get("rows") or content.get("axes")):
        raise UsageError(f"The sweep {name} has parts: move its rows and axes into them.")
    for choice in content.get("with") or {}:
        group, _, value = choice.partition("=")
        if group in GROUPS:
            load_choice(group, value)
        elif not value:
            raise UsageError(f"The sweep {name} has settings with {choice}: write GROUP=CHOICE, or KEY=VALUE.")
    earlier: list[str] = []
    for part, its in parts.items():
        _check_keys(f"key of the part {part} of the sweep {name}", its, PART_KEYS)
        for key, source in (its.get("choose") or {}).items():
            # Only earlier parts, so that parts cannot wait for each other.
            if source not in earlier:
                raise UsageError(
                    f"The part {part} of the sweep {name} chooses {key} from {source}, which is not an earlier part."
                )
        earlier.append(part)
    for its in (content, *parts.values()):
        for row in its.get("rows") or []:
            _check_keys(f"key of a row of the sweep {name}", row, ("labels", "settings"))
    shared = _texts(content.get("settings"))
    one_table = bool(content.get("one_table"))
    return Spec(
        name=content["name"],
        # Without parts, the sweep itself is the only grid, and its settings are not shared with any other.
        grids=[_grid(its, shared, part, one_table) for part, its in parts.items()] or [_grid(content, {}, "")],
        choices={choice: _texts(settings) for choice, settings in (content.get("with") or {}).items()},
        one_table=one_table,
        controls=list(content.get("controls") or []),
        jobs=content.get("jobs"),
    )


_LISTS = ("rows", "controls")
_MAPPINGS = ("settings", "axes", "parts", "with", "choose", "labels")


def _check_keys(kind: str, content: Any, known: Iterable[str]) -> None:
    if not isinstance(content, Mapping):
        raise UsageError(f"Expected KEY: VALUE pairs, each a {kind}; found {content!r}.")
    for key, value in content.items():
        if key not in known:
            raise unknown(kind, key, known)
        if value is not None and key in _LISTS and not isinstance(value, list):
            raise UsageError(f"The {kind} {key!r} must hold a list, not {value!r}.")
        if value is not None and key in _MAPPINGS and not isinstance(value, Mapping):
            raise UsageError(f"The {kind} {key!r} must hold KEY: VALUE pairs, not {value!r}.")
    for axis, values in (content.get("axes") or {}).items():
        if not isinstance(values, list):
            raise UsageError(f"The {kind} 'axes': {axis} must hold a list, not {values!r}.")


def _grid(content: Mapping[str, Any], shared: Mapping[str, str], part: str, one_table: bool = False) -> RunGrid:
    label = {PART: part} if part and not one_table else {}
    return RunGrid(
        name=part,
        settings={**shared, **_texts(content.get("settings"))},
        rows=[
            SweepRow({**label, **(row.get("labels") or {})}, _texts(row.get("settings")))
            for row in content.get("rows") or [{}]
        ],
        axes={key: [_text(value) for value in values] for key, values in (content.get("axes") or {}).items()},
        choose=dict(content.get("choose") or {}),
    )


def _texts(settings: Mapping[Any, Any] | None) -> dict[str, str]:
    return {str(key): _text(value) for key, value in (settings or {}).items()}


def _text(value: Any) -> str:
    """A value of a YAML as written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _default_name(spec: Spec) -> str:
    """The axes' names and a digest of the shared settings: adding values to an axis continues the same sweep."""
    grid = spec.grids[0]  # the only one: a sweep without a name comes from the command line, which has no parts
    shared = json.dumps({key: value for key, value in grid.settings.items() if not is_free(key)}, sort_keys=True)
    names = [key.rpartition(".")[2] for key in grid.axes]
    return "-".join([*names, hashlib.sha256(shared.encode()).hexdigest()[:6]])
