"""From names to benchmarks: single choices, groups of them, and their YAMLs."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_deco.config import load_choice
from prism_deco.config.benchmarks import benchmark_name, resolve_benchmarks
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Question
from prism_deco.evaluation.keys import keys_of, typed

log = logging.getLogger(__name__)


def build_benchmark(choice: str | Mapping[str, Any], **overrides: Any) -> Benchmark:
    """Builds a benchmark.

    Args:
        choice: a name under `conf/benchmark` (or the path of a YAML), or the mapping of one.
        overrides: keys to replace, such as `root`, `split` or `limit`. Text, as on a command line, is read by the type
            of its key.

    Raises:
        UsageError: an unknown choice, family or key, with the nearest valid ones; a value of a wrong type; a group.
    """
    content = dict(load_choice("benchmark", choice) if isinstance(choice, str) else choice) | overrides
    if "members" in content:
        raise UsageError(f"{content['name']} is a group of benchmarks: {', '.join(content['members'])}. Name one.")
    name = content.get("name")
    if "family" not in content:
        raise UsageError(f"The benchmark {name!r} has no `family`. Families: {', '.join(BENCHMARKS.names())}.")
    family = BENCHMARKS.get(content.pop("family"))
    valid = keys_of(family)
    for key, value in content.items():
        if key not in valid:
            raise unknown(f"key of the benchmark {name}", key, valid)
        content[key] = typed(f"{name}: {key}", value, valid[key])
    missing = [key for key, parameter in valid.items() if parameter.default is parameter.empty and key not in content]
    if missing:
        raise UsageError(f"The benchmark {name} is missing the key {' and '.join(missing)}.")
    return family(**content)


def check_keys(names: str | Iterable[str], keys: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raises `UsageError` for a key that none of the benchmarks has.

    Args:
        also: other keys that may be given where these are.
    """
    families = [BENCHMARKS.get(load_choice("benchmark", name)["family"]) for name in resolve_benchmarks(names)]
    known = {*also, *(key for family in families for key in keys_of(family) if key != "name")}
    for key in keys:
        if key not in known:
            raise unknown("key", key, known)


def prepare(
    names: str | Iterable[str],
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    root: Path | None = None,
) -> list[Benchmark]:
    """Builds benchmarks and reads their annotation files, so that what is wrong with any of them is known before a
    model is trained or loaded. Of the images only the first is looked for: all of them would take minutes.

    Args:
        names: see `resolve_benchmarks`.
        options: keys to replace in all of them; None keeps what a YAML says.
        own: keys to replace in single ones, by their names.
        root: the folder of those that have none of their own.

    Raises:
        UsageError: an unknown name or key, a value of a wrong type, a file that is missing or damaged, no questions.
    """
    shared = {key: value for key, value in (options or {}).items() if value is not None}
    names = resolve_benchmarks(names)
    if not names:
        raise UsageError("No benchmark is named.")
    prepared = []
    for name in names:
        keys = shared | dict((own or {}).get(benchmark_name(name), {}))
        prepared.append(build_benchmark(name, **keys))
    for benchmark in prepared:
        benchmark.root = benchmark.root or root
        if benchmark.root is None:
            raise UsageError(
                f"{benchmark.name} needs the folder of its files, and the training data bring none: set "
                f"benchmark.{benchmark.name}.root=FOLDER, choose other benchmarks, or train with "
                "evaluate.benchmarks=null."
            )
        try:
            questions = benchmark.select()
        except UsageError as error:
            reason = str(error).removeprefix(f"{benchmark.name}: ")
            raise UsageError(f"{benchmark.name}, split {benchmark.split!r}: {reason}") from error
        log.info("%s: read %s", benchmark.name, _counted(questions))
        for path in questions[0].paths if benchmark.on_bad_image == "fail" else ():
            if not path.is_file():
                raise UsageError(f"{benchmark.name}: the image {path} is missing.")
    return prepared


def check_names(names: str | Iterable[str], own: Mapping[str, Any]) -> None:
    """Raises `UsageError` where keys are given for a benchmark that is not among the names.

    Args:
        names: of benchmarks and groups.
        own: keys by benchmark.
    """
    asked = [benchmark_name(name) for name in resolve_benchmarks(names)]
    for name in own:
        if name not in asked:
            raise unknown("benchmark, among those that are asked for,", name, asked)


def prepare_one(
    name: str, options: Mapping[str, Any] | None = None, *, root: Path | None = None, boxes: bool = False
) -> Benchmark:
    """Like `prepare`, for what measures one benchmark.

    Args:
        boxes: it must ask for boxes.

    Raises:
        UsageError: several benchmarks, or none with boxes, as well.
    """
    names = resolve_benchmarks(name)
    if len(names) > 1:
        raise UsageError(f"{name} is a group of benchmarks: {', '.join(names)}. Name one.")
    (benchmark,) = prepare(names, options, root=root)
    if boxes and not any("box" in question.target for question in benchmark.select()):
        raise UsageError(f"{name} has no boxes that relevance could lie in: name one that has, such as mini_refcoco.")
    return benchmark


def _counted(questions: Sequence[Question]) -> str:
    """`5 questions (random 3, popular 2)`."""
    counts = Counter(question.stratum for question in questions)
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{len(questions)} questions" + (f" ({parts})" if len(counts) > 1 else "")
