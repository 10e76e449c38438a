"""Keys and values: what the schema says of each dotted key, and how values of the command line and of YAML files are
read and written. Text stays as it is where the schema says text."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_deco.config.schema import GROUPS, Config
from prism_deco.errors import UsageError

TEXT_OPTIONS = {
    "backbone": ("model", "hub", "file"),
    "projector": ("weights", "init"),
    "llm": ("revision", "tokenizer", "dtype", "attention", "quantize"),
    "data": ("root", "json", "image_root", "val_json", "path", "val_path", "repo", "revision"),
    "benchmark": (
        "family", "root", "annotations", "questions", "instances", "ocr", "image", "split", "on_bad_image",
        "variants", "choices", "subsets",
    ),
}  # fmt: skip
"""Options of single components that are text or lists of text. Where a YAML's default is null, its type says nothing.
"""

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple[float, float]": "two numbers such as [0.9, 0.95]",
    "list[str]": "a list of names such as [a, b]",
    "list[int]": "a list of whole numbers such as [11, 15]",
    "list[Any]": "a list of names or mappings such as [a, {b: {key: value}}]",
}
"""What messages and pages call the types of the schema; the others are mappings."""

RETIRED = {
    "trainer.feature_cache=auto": "auto is no longer a choice, since it needed a plan of every run: use true where an "
    "image is seen several times, by epochs or by runs of a sweep, and the towers are much of the work, else false",
    "trainer.feature_cache_runs": "only trainer.feature_cache=auto used it, which is no longer a choice",
}
"""Keys and values of earlier versions: stored configurations may hold them, new ones may not."""


def type_text(annotation: object) -> str:
    """A field's type in words: `int | None` -> "a whole number or null"."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    null = " or null" if text.endswith(" | None") else ""
    return TYPES.get(text.removesuffix(" | None"), "a mapping such as {key: value}") + null


@cache
def schema_keys() -> dict[str, Field[Any]]:
    """The field of every key: `recipe.lr`, `seed`, ..."""
    found: dict[str, Field[Any]] = {}
    for member in fields(Config):
        kind = member.default_factory
        if is_dataclass(kind):
            found |= {f"{member.name}.{leaf.name}": leaf for leaf in fields(kind)}
        else:
            found[member.name] = member
    return found


_TEXT_KEYS = {
    *GROUPS,
    *(key for key, member in schema_keys().items() if member.type in ("str", "str | None")),
    *(f"{group}.{key}" for group, keys in TEXT_OPTIONS.items() for key in keys),
}


def is_text_key(key: str) -> bool:
    """Whether a key's value is text: the name of a choice, a `str` field, or one of `TEXT_OPTIONS`."""
    first, _, rest = key.partition(".")
    if first == "sweep" and _is_text_of_sweep(rest):  # the key of a sweep's YAML
        return True
    if first == "benchmark":  # benchmark.NAME.KEY
        key = f"benchmark.{rest.rpartition('.')[2]}"
    elif rest and first not in Config.__dataclass_fields__:  # STAGE.GROUP.KEY
        key = rest
    return key in _TEXT_KEYS


def _is_text_of_sweep(key: str) -> bool:
    """Its name, the parts that `choose` names, and labels of the user's own; a label such as `seed` or
    `projector.heads` is a key's value."""
    _, is_label, label = key.rpartition("labels.")
    if is_label:
        return "." not in label and label not in schema_keys()
    return key == "name" or "choose." in key


def split_pair(override: str) -> tuple[str, str]:
    """The key and the text of `key=value`; `UsageError` if it is no such pair."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override: write key=value, for example projector=avgpool.")
    return key, text


def parse_value(key: str, text: str, *, is_text: bool | None = None) -> Any:
    """A value of the command line. As text it stays as it is, without its quotes, and `null` or nothing is None;
    otherwise YAML reads it: `7` -> 7, `[1, 2]` -> [1, 2].

    Args:
        is_text: whether the key takes text; None asks the schema.

    Raises:
        UsageError: it is not valid YAML; names the key.
    """
    if is_text_key(key) if is_text is None else is_text:
        return _parse_text(text)
    try:
        return _from_yaml(text)
    except _NOT_YAML as error:
        raise UsageError(f"{key}={text}: the value of {key} is not valid YAML ({_problem(error)}).") from error


def _parse_text(text: str) -> str | None:
    if text in ("", "null"):
        return None
    if text[0] in "'\"" and text[0] == text[-1]:
        try:
            value = _from_yaml(text)
        except _NOT_YAML:  # quotes of several words: 'a' or 'b'
            return text
        return value if isinstance(value, str) else text
    return text


def value_text(key: str, value: Any, *, is_text: bool | None = None) -> str:
    """A value as the command line takes it, small numbers as `2e-5`. `parse_value` reads it back.

    Args:
        is_text: whether the key takes text; None asks the schema. With False the result also fits into a YAML file.
    """
    if isinstance(value, str):
        try:
            is_plain = parse_value(key, value, is_text=is_text) == value
        except UsageError:
            is_plain = False
        return value if is_plain else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
        return short if float(short) == value else repr(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def flatten(content: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as `group.key` -> value; lists and empty mappings stay whole."""
    flattened: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            flattened |= flatten(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


def read_yaml(path: Path, group: str = "") -> dict[str, Any]:
    """The content of a YAML file, references (`${...}`) left as they are.

    Args:
        group: the group that the file is a choice of; empty where its keys name their groups.

    Raises:
        UsageError: it cannot be read, is not valid YAML (with the line), or is something else than `key: value` lines.
    """
    try:
        content = _read_source(path.read_text(encoding="utf-8"), group)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a UTF-8 text file ({error}).") from error
    except _NOT_YAML as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{line}: not valid YAML ({_problem(error)}).") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected `key: value` lines.")
    return copy.deepcopy(content)


@lru_cache(maxsize=256)
def _read_source(source: str, group: str) -> Any:
    """What the text of a file holds; shared, as the cells of a sweep are made of the same few files."""
    content = _from_yaml(source)
    return _keep_text(content, yaml.load(source, Loader=yaml.BaseLoader), group) if content else content


def _keep_text(value: Any, written: Any, key: str) -> Any:
    """What YAML made of a file's text, with the written text back where the schema says text.

    Args:
        written: the same content, every scalar as text.
        key: the key that it is the value of.
    """
    if isinstance(value, dict) and isinstance(written, dict):
        kept = {}
        # Names, too, stand as they are written, unless YAML merged mappings (`<<`) or took two of them for one.
        names = written if "<<" not in written and len(written) == len(value) else map(str, value)
        for name, entry in zip(names, value.values(), strict=True):
            # Keys of a sweep's settings name their group themselves.
            full = f"{key}.{name}" if key and not is_text_key(name) else name
            kept[name] = _keep_text(entry, written.get(name), full)
        return kept
    if isinstance(value, list) and isinstance(written, list):
        return [_keep_text(entry, text, key) for entry, text in zip(value, written, strict=True)]
    if is_text_key(key) and isinstance(value, int | float) and isinstance(written, str):
        return written
    return value


_NOT_YAML = (yaml.YAMLError, OmegaConfBaseException, ValueError)


def _from_yaml(text: str) -> Any:
    # Not by OmegaConf.create or OmegaConf.load: those take a word for a mapping.
    content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"text={text}"]))
    return content["text"]


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
