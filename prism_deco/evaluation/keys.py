"""The keys of a benchmark's YAML, read off the signatures of its class."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

import yaml

from prism_deco.config import parse_value
from prism_deco.errors import UsageError
from prism_deco.evaluation.base import Benchmark


def keys_of(family: type[Benchmark]) -> dict[str, inspect.Parameter]:
    """Keyword arguments of a family, its bases' included, their annotations resolved."""
    keys: dict[str, inspect.Parameter] = {}
    for base in family.__mro__:
        if "__init__" in vars(base) and issubclass(base, Benchmark):
            for name, parameter in _parameters(base).items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    keys.setdefault(name, parameter)
    return keys


def _parameters(base: type) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(base.__init__, eval_str=True).parameters
    except NameError:  # a plug-in may import the names of its annotations for type checkers only
        return inspect.signature(base.__init__).parameters


def typed(key: str, value: Any, parameter: inspect.Parameter) -> Any:
    """A value as its key's type has it; text is read by that type. Types other than these are taken as they are."""
    annotation = parameter.annotation
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
    if int in kinds and type(value) is not int:
        raise UsageError(f"{key}={value} must be a whole number.")
    return value


def _texts(text: str) -> Any:
    """`[Yes, 5]` -> ["Yes", "5"]; what is no list is the only one."""
    if not text.startswith("["):
        return [text]
    try:
        return yaml.load(text, Loader=yaml.BaseLoader)  # this loader makes text of all scalars
    except yaml.YAMLError:
        return None
