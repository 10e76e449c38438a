"""What is known about each key of the schema, by its dotted name."""

from __future__ import annotations

from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import Any

from prism_deco.config.fields import Range
from prism_deco.config.schema import GROUPS, Config

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


def is_text_key(key: str) -> bool:
    """Whether a key's value is text: the name of a choice, a `str` field, or one of `TEXT_OPTIONS`."""
    first, _, rest = key.partition(".")
    if first == "sweep" and _is_text_of_sweep(rest):  # the key of a sweep's YAML
        return True
    if first == "benchmark":  # benchmark.NAME.KEY
        key = f"benchmark.{rest.rpartition('.')[2]}"
    elif rest and first not in Config.__dataclass_fields__:  # STAGE.GROUP.KEY
        key = rest
    return key in _text_keys()


def _is_text_of_sweep(key: str) -> bool:
    """Its name, the parts that `choose` names, and labels of the user's own; a label such as `seed` or
    `projector.heads` is a key's value."""
    _, is_label, label = key.rpartition("labels.")
    if is_label:
        return "." not in label and label not in schema_keys()
    return key == "name" or "choose." in key


@cache
def _text_keys() -> frozenset[str]:
    texts = {key for key, member in schema_keys().items() if member.type in ("str", "str | None")}
    options = {f"{group}.{key}" for group, keys in TEXT_OPTIONS.items() for key in keys}
    return frozenset({*GROUPS, *texts, *options})


def allowed() -> dict[str, Range | tuple[str, ...]]:
    """The keys that take only a part of their type: `recipe.lr` -> above 0, `recipe.prompt` -> two names."""
    return {key: member.metadata["allowed"] for key, member in schema_keys().items() if "allowed" in member.metadata}
