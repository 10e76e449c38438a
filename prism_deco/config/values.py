"""Reads and writes values of the command line and of YAML files. Where the schema says text, text is kept as written:
`llm.revision=1e5` is not a number."""

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
"""Options of single components that take text or lists of text. The default in a YAML is often null and tells no type.
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
"""The schema's types in words, for messages and pages; all others are mappings."""

RETIRED = {
    "trainer.feature_cache=auto": "auto is no longer a choice, since it needed a plan of every run: use true where an "
    "image is seen several times, by epochs or by runs of a sweep, and the towers are much of the work, else false",
    "trainer.feature_cache_runs": "only trainer.feature_cache=auto used it, which is no longer a choice",
}
"""Keys and values of earlier versions: allowed in stored configurations, refused in new ones."""


def type_text(annotation: object) -> str:
    """A field's type in words: `int | None` -> "a whole number or null"."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    null = " or null" if text.endswith(" | None") else ""
    return TYPES.get(text.removesuffix(" | None"), "a mapping such as {key: value}") + null


@cache
def schema_keys() -> dict[str, Field[Any]]:
    """The schema's field of every dotted key: `recipe.lr`, `seed`, ..."""
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
    """Text are a sweep's name, the parts under `choose`, and free labels; a label named like a key (`seed`,
    `projector.heads`) has a value of that key."""
    _, is_label, label = key.rpartition("labels.")
    if is_label:
        return "." not in label and label not in schema_keys()
    return key == "name" or "choose." in key


def split_pair(override: str) -> tuple[str, str]:
    """Splits `key=value`; raises `UsageError` for anything else."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UsageError(f"{override!r} is not an override: write key=value, for example projector=avgpool.")
    return key, text


def parse_value(key: str, text: str, *, is_text: bool | None = None) -> Any:
    """Parses a value of the command line. Text loses its quotes, and `null` or an empty text is None; other values are
    YAML: `7` -> 7, `[1, 2]` -> [1, 2].

    Args:
        is_text: whether the key takes text; None asks the schema.
    """
    if not (is_text_key(key) if is_text is None else is_text):
        try:
            return _from_yaml(text)
        except _NOT_YAML as error:
            raise UsageError(f"{key}={text}: the value of {key} is not valid YAML ({_problem(error)}).") from error
    if text in ("", "null"):
        return None
    if text[0] in "'\"" and text[0] == text[-1]:
        try:
            value = _from_yaml(text)
        except _NOT_YAML:  # several quoted words: 'a' or 'b'
            return text
        return value if isinstance(value, str) else text
    # A shell leaves the `~` of `data.json=~/mix.json` as it is.
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def value_text(key: str, value: Any, *, is_text: bool | None = None) -> str:
    """The inverse of `parse_value`; small numbers become `2e-5`.

    Args:
        is_text: whether the key takes text; None asks the schema. With False the result is also valid in a YAML file.
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
    """Flattens nested mappings to `group.key` -> value; lists and empty mappings stay whole."""
    flattened: dict[str, Any] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            flattened |= flatten(value, f"{prefix}{name}.")
        else:
            flattened[f"{prefix}{name}"] = value
    return flattened


def read_yaml(path: Path, group: str = "") -> dict[str, Any]:
    """The content of a YAML file with unresolved references (`${...}`).

    Args:
        group: the group that the file is a choice of; empty if its keys name their groups.

    Raises:
        UsageError: it cannot be read, is not valid YAML (names the line), or is not a mapping.
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
    """Parses a file's text; cached for sweeps, whose cells read the same few files. Callers must copy the result."""
    content = _from_yaml(source)
    return _keep_text(content, yaml.load(source, Loader=yaml.BaseLoader), group) if content else content


def _keep_text(value: Any, written: Any, key: str) -> Any:
    """Replaces parsed scalars by their written text where the schema says text.

    Args:
        value: the parsed content.
        written: the same content with every scalar as text.
        key: the key that holds the value.
    """
    if isinstance(value, dict) and isinstance(written, dict):
        kept = {}
        # Names are kept as written, too, unless YAML merged mappings (`<<`) or two names into one.
        names = written if "<<" not in written and len(written) == len(value) else map(str, value)
        for name, entry in zip(names, value.values(), strict=True):
            # Keys in a sweep's settings include their group.
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
    # OmegaConf.create and OmegaConf.load would turn a single word into a mapping.
    content: Any = OmegaConf.to_container(OmegaConf.from_dotlist([f"text={text}"]))
    return content["text"]


def _problem(error: Exception) -> str:
    return getattr(error, "problem", None) or str(error).splitlines()[0]
