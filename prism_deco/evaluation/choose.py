"""From names to benchmarks: single choices, groups of them, and their YAMLs."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_deco.config import load_choice
from prism_deco.errors import UsageError
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Question

log = logging.getLogger(__name__)


def build_benchmark(choice: str | Mapping[str, Any], **overrides: Any) -> Benchmark:
    """Builds a benchmark.

    Args:
        choice: a name under `conf/benchmark` (or the path of a YAML), or the mapping of one.
        overrides: keys to replace, such as `root`, `split` or `limit`.

    Raises:
        UsageError: an unknown choice, family or key, with the nearest valid ones; a group.
    """
    content = dict(load_choice("benchmark", choice) if isinstance(choice, str) else choice) | overrides
    if "members" in content:
        raise UsageError(f"{content['name']} is a group of benchmarks: {', '.join(content['members'])}. Name one.")
    if "family" not in content:
        raise UsageError(f"The benchmark {content.get('name')!r} has no `family`. Families: {_families()}.")
    family = BENCHMARKS.get(content.pop("family"))
    valid = _keys(family)
    for key in content:
        if key not in valid:
            near = difflib.get_close_matches(key, valid, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise UsageError(
                f"Unknown key {key} of the benchmark {content.get('name')}.{hint} Keys: {', '.join(valid)}."
            )
    missing = [key for key, required in valid.items() if required and key not in content]
    if missing:
        raise UsageError(f"The benchmark {content.get('name')} lacks the key {' and '.join(missing)}.")
    return family(**content)


def resolve(names: str | Iterable[str]) -> list[str]:
    """Benchmark names with their groups (YAMLs with `members`) expanded; each once, in order.

    Args:
        names: a list, or a string with commas.

    Raises:
        UsageError: an unknown name, or groups that contain each other.
    """
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    return list(dict.fromkeys(member for name in names for member in _expand(name, ())))


def prepare(
    names: str | Iterable[str], options: Mapping[str, Any] | None = None, *, root: Path | None = None
) -> list[Benchmark]:
    """Builds benchmarks and reads their annotation files, so that what is wrong with any of them is known before a
    model is trained or loaded. Of the images only the first is looked for: all of them would take minutes.

    Args:
        names: see `resolve`.
        options: keys to replace in all of them; None keeps what a YAML says.
        root: the folder of those that have none of their own.

    Raises:
        UsageError: an unknown name or key, a value of a wrong type, a file that is missing or damaged, no questions.
    """
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in ("limit", "max_new_tokens"):
        if key in given and type(given[key]) is not int:
            raise UsageError(f"{key}={given[key]} must be a whole number.")
    names = resolve(names)
    if not names:
        raise UsageError("No benchmark is named.")
    prepared = [build_benchmark(name, **given) for name in names]
    for benchmark in prepared:
        benchmark.root = benchmark.root or root
        if benchmark.root is None:
            raise UsageError(
                f"{benchmark.name} has no folder of its own, and the training data bring none: set `root` in a copy of "
                f"its YAML and name that, or use `prism-deco evaluate` with root=FOLDER."
            )
        try:
            questions = benchmark.select()
        except UsageError as error:
            reason = str(error).removeprefix(f"{benchmark.name}: ")
            raise UsageError(f"{benchmark.name}, split {benchmark.split!r}: {reason}") from error
        log.info("%s: read %s", benchmark.name, _counted(questions))
        first = questions[0]
        if benchmark.on_bad_image == "fail" and not first.path.is_file():
            raise UsageError(f"{benchmark.name}: the image {first.path} is missing.")
    return prepared


def prepare_one(
    name: str, options: Mapping[str, Any] | None = None, *, root: Path | None = None, boxes: bool = False
) -> Benchmark:
    """Like `prepare`, for what measures one benchmark.

    Args:
        boxes: it must ask for boxes.

    Raises:
        UsageError: several benchmarks, or none with boxes, as well.
    """
    names = resolve(name)
    if len(names) > 1:
        raise UsageError(f"{name} is a group of benchmarks: {', '.join(names)}. Name one.")
    (benchmark,) = prepare(names, options, root=root)
    if boxes and not any("box" in question.target for question in benchmark.select()):
        raise UsageError(f"{name} has no boxes that relevance could lie in: name one that has, such as mini_refcoco.")
    return benchmark


def results_name(choice: str, split: str | None = None) -> str:
    """What the folder of a benchmark's results is called: its name, with the split where that is not its own."""
    own = build_benchmark(choice)
    return own.name if split in (None, own.split) else f"{own.name}-{split}"


def _expand(name: str, parents: tuple[str, ...]) -> list[str]:
    if name in parents:
        raise UsageError(f"The benchmark groups {' > '.join((*parents, name))} contain each other.")
    members = load_choice("benchmark", name).get("members")
    if members is None:
        return [name]
    return [leaf for member in members for leaf in _expand(member, (*parents, name))]


def _counted(questions: Sequence[Question]) -> str:
    """`5 questions (random 3, popular 2)`."""
    counts = Counter(question.stratum for question in questions)
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{len(questions)} questions" + (f" ({parts})" if len(counts) > 1 else "")


def _families() -> str:
    return ", ".join(BENCHMARKS.names())


def _keys(family: type[Benchmark]) -> dict[str, bool]:
    """Keyword arguments of a family, its bases' included: whether each is required."""
    keys: dict[str, bool] = {}
    for base in family.__mro__:
        if "__init__" in vars(base) and issubclass(base, Benchmark):
            for name, parameter in inspect.signature(base.__init__).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keys.setdefault(name, parameter.default is parameter.empty)
    return keys
