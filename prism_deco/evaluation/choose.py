"""Builds benchmarks from names and YAMLs, and checks them before anything slow begins."""

from __future__ import annotations

import inspect
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from prism_deco.config import load_choice, parse_value
from prism_deco.config.choices import choice_name, resolve_benchmarks
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.evaluation.base import BENCHMARKS, Benchmark
from prism_deco.evaluation.items import Question

log = logging.getLogger(__name__)


def build_benchmark(choice: str | Mapping[str, Any], **overrides: Any) -> Benchmark:
    """Builds a benchmark.

    Args:
        choice: a name under `conf/benchmark`, the path of a YAML, or the content of one.
        overrides: keys to replace, such as `root`, `split` or `limit`. Text, as from a command line, is parsed
            according to the type of its key.

    Raises:
        UsageError: an unknown choice, family or key, with the nearest valid ones; a value of a wrong type; a group.
    """
    content = dict(load_choice("benchmark", choice) if isinstance(choice, str) else choice) | overrides
    name = content.get("name")
    if "members" in content:
        raise UsageError(f"{name} is a group of benchmarks: {', '.join(content['members'])}. Name one.")
    if "family" not in content:
        raise UsageError(f"The benchmark {name!r} has no `family`. Families: {', '.join(BENCHMARKS.names())}.")
    family = BENCHMARKS.get(content.pop("family"))
    valid = _keys_of(family)
    for key, value in content.items():
        if key not in valid:
            raise unknown(f"key of the benchmark {name}", key, valid)
        content[key] = _typed(f"{name}: {key}", value, valid[key])
    missing = [key for key, parameter in valid.items() if parameter.default is parameter.empty and key not in content]
    if missing:
        raise UsageError(f"The benchmark {name} is missing the key {' and '.join(missing)}.")
    return family(**content)


def check_keys(
    names: str | Iterable[str], options: Iterable[str], own: Iterable[str] = (), also: Iterable[str] = ()
) -> None:
    """Checks that keys on a command line belong to the requested benchmarks.

    Args:
        names: names of benchmarks and groups; if empty, the keys of any benchmark are valid.
        options: keys given for all of them.
        own: benchmarks for which individual keys are given.
        also: further valid keys among `options`.
    """
    choices = resolve_benchmarks(names)
    names_of_families = [load_choice("benchmark", choice)["family"] for choice in choices] or BENCHMARKS.names()
    known = set(also)
    for family in names_of_families:
        # A benchmark's name comes from its YAML and is no key of a command line.
        known.update(key for key in _keys_of(BENCHMARKS.get(family)) if key != "name")
    for key in options:
        if key not in known:
            raise unknown("key", key, known)
    asked = [choice_name(choice) for choice in choices]
    for name in own:
        if asked and name not in asked:
            raise unknown("benchmark, among those that are asked for,", name, asked)


def prepare(
    names: str | Iterable[str],
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    root: Path | None = None,
) -> list[Benchmark]:
    """Builds benchmarks and reads their annotation files, so that errors appear before a model is trained or loaded.

    Of the images, it only checks that the first exists: checking all would take minutes.

    Args:
        names: see `resolve_benchmarks`.
        options: keys to replace in all of them; the value None keeps the YAML's.
        own: keys to replace in single ones, by name.
        root: the folder of benchmarks whose YAML names none.
    """
    shared = {key: value for key, value in (options or {}).items() if value is not None}
    names = resolve_benchmarks(names)
    if not names:
        raise UsageError("Name at least one benchmark.")
    prepared = []
    for name in names:
        keys = shared | dict((own or {}).get(choice_name(name), {}))
        prepared.append(build_benchmark(name, **keys))
    for benchmark in prepared:
        benchmark.root = benchmark.root or root
        if benchmark.root is None:
            raise UsageError(
                f"{benchmark.name} needs a folder with its files, and the training data come with none: set "
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
            if not os.path.isfile(path):
                raise UsageError(f"{benchmark.name}: the image {path} is missing.")
    return prepared


def prepare_one(
    name: str, options: Mapping[str, Any] | None = None, *, root: Path | None = None, boxes: bool = False
) -> Benchmark:
    """Like `prepare`, for a single benchmark.

    Args:
        boxes: its targets must have boxes.
    """
    names = resolve_benchmarks(name)
    if len(names) > 1:
        raise UsageError(f"{name} is a group of benchmarks: {', '.join(names)}. Name one.")
    (benchmark,) = prepare(names, options, root=root)
    if boxes and not any("box" in question.target for question in benchmark.select()):
        raise UsageError(
            f"{name} has no boxes to compare relevance with: name a benchmark that has them, such as mini_refcoco."
        )
    return benchmark


def _counted(questions: Sequence[Question]) -> str:
    """`5 questions (random 3, popular 2)`."""
    counts = Counter(question.stratum for question in questions)
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    return f"{len(questions)} questions" + (f" ({parts})" if len(counts) > 1 else "")


def _keys_of(family: type[Benchmark]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a family and its bases, with their annotations resolved."""
    keys: dict[str, inspect.Parameter] = {}
    # Subclasses pass their `**common` on to their bases; where both have a key, the subclass's counts.
    for base in family.__mro__:
        if "__init__" in vars(base) and issubclass(base, Benchmark):
            for name, parameter in _parameters(base).items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keys.setdefault(name, parameter)
    return keys


def _parameters(base: type) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(base.__init__, eval_str=True).parameters
    except NameError:  # a plug-in may import the types of its annotations under TYPE_CHECKING only
        return inspect.signature(base.__init__).parameters


def _typed(key: str, value: Any, parameter: inspect.Parameter) -> Any:
    """Checks a value against the type of its key, and parses text; values of other types are returned unchanged."""
    annotation = parameter.annotation
    # `int | None` -> (int, NoneType); any other annotation is its only kind.
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    if NoneType in kinds and value in (None, "null"):
        return None
    if str in kinds:
        if not isinstance(value, str | Path):
            raise UsageError(f"{key}={value} must be text: write it in quotes.")
        return value
    if any(get_origin(kind) in (Sequence, list, tuple) and get_args(kind)[:1] == (str,) for kind in kinds):
        texts = _texts(value) if isinstance(value, str) else value
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"{key}={value} must be a list of texts; in YAML, Yes, No and numbers need quotes.")
        return texts
    if isinstance(value, str):
        value = parse_value(key, value)
    # Not isinstance, which accepts true and false.
    if int in kinds and type(value) is not int:
        raise UsageError(f"{key}={value} must be a whole number.")
    return value


def _texts(text: str) -> Any:
    """`[Yes, 5]` -> ["Yes", "5"]; other text is the only element. None for invalid YAML."""
    if not text.startswith("["):
        return [text]
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # BaseLoader keeps all scalars as text
    except yaml.YAMLError:
        return None
