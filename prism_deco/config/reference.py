"""The keys of the configuration with their types, defaults and meanings, as `schema.py` states them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING as UNSET
from dataclasses import Field, dataclass
from functools import cache

from omegaconf import MISSING

from prism_deco.config import schema
from prism_deco.config.fields import Range
from prism_deco.config.parse import value_text

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "tuple[float, float]": "two numbers such as [0.9, 0.95]",
    "list[str]": "a list of names such as [a, b]",
}
"""What messages and pages call the types of the schema; the others are mappings."""


@dataclass(frozen=True)
class Key:
    """A key of the configuration: `recipe.lr`, what it takes, its default, and what it means."""

    name: str
    type: str
    default: str
    meaning: str


def type_text(annotation: object) -> str:
    """A field's type in words: `int | None` -> "a whole number or null"."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    null = " or null" if text.endswith(" | None") else ""
    return TYPES.get(text.removesuffix(" | None"), "a mapping such as {key: value}") + null


@cache
def reference() -> dict[str, Key]:
    """All keys, in the schema's order."""
    texts = _docstrings()
    keys = {}
    for name, member in schema.schema_keys().items():
        rule = member.metadata.get("allowed")
        takes = f"{type_text(member.type)}, {rule}" if isinstance(rule, Range) else type_text(member.type)
        if isinstance(rule, tuple):
            takes = " | ".join(rule)
        keys[name] = Key(name, takes, _default(name, member), texts[name])
    return keys


def _default(name: str, member: Field) -> str:
    default = member.default_factory() if member.default_factory is not UNSET else member.default
    return "" if default == MISSING else value_text(name, default)


def _docstrings() -> dict[str, str]:
    """The string below each field of the schema's classes, in one line."""
    groups = {type(member).__name__: name for name, member in vars(schema.Config()).items()}
    texts = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        prefix = f"{groups[node.name]}." if node.name in groups else ""
        for statement, below in zip(node.body, node.body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                text = ast.literal_eval(below.value)
                texts[f"{prefix}{ast.unparse(statement.target)}"] = " ".join(text.split())
    return texts
