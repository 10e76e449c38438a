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
from prism_deco.config.keys import schema_keys
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
    takes: str
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
    for name, member in schema_keys().items():
        keys[name] = Key(name, _takes(member), _default(name, member), texts[name])
    return keys


def _takes(member: Field) -> str:
    """What a field takes: its choices, or its type and range."""
    rule = member.metadata.get("allowed")
    is_optional = str(member.type).endswith(" | None")
    if isinstance(rule, tuple):
        return " | ".join((*rule, "null") if is_optional else rule)
    if isinstance(rule, Range):
        text = f"{type_text(str(member.type).removesuffix(' | None'))}, {rule}"
        return f"{text}, or null" if is_optional else text
    return type_text(member.type)


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
