"""The keys of the configuration with their types, defaults and meanings, as `schema.py` states them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING as UNSET
from dataclasses import Field, dataclass
from functools import cache

from omegaconf import MISSING

from prism_deco.config import schema
from prism_deco.config.choices import choice_path, choices
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
    for name, member in schema.schema_keys().items():
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


def reference_page() -> str:
    """`conf/README.md`: how a configuration is composed, every key, and every choice."""
    sections = [_INTRODUCTION]
    for group in (*schema.GROUPS, "evaluate", ""):
        title = f"`{group}`" if group else "The run"
        sections.append(f"## {title}\n\n{_key_table(group)}{_choice_table(group) if group in schema.GROUPS else ''}")
    for folder, text in _OTHER_FOLDERS.items():
        sections.append(f"## `{folder}`\n\n{text}\n\n{_choice_table(folder)}")
    return "\n".join(sections)


_INTRODUCTION = """\
# Configuration

`prism-deco train` composes a run from one choice per group, each a YAML file in a folder of this one, and from single
settings:

```bash
prism-deco train projector=c_abstractor projector.depth=2 recipe=mine.yaml seed=3
```

`config.yaml` names the default choices. `GROUP=NAME` takes another one, `GROUP=FILE.yaml` a file of your own,
`GROUP.KEY=VALUE` sets a key. A YAML file without `GROUP=`, such as a run's `config.yaml`, sets several at once; the
command line wins. `prism-deco train --print` shows the result and where each value comes from.

The tables list the keys that all choices of a group share, their types, and the defaults of the schema, which a
choice's YAML replaces. Keys that only some choices have are explained in their YAML files. A value such as
`${recipe.num_tokens}` is a reference to another key. This page is generated: `prism-deco keys --markdown`.
"""

_OTHER_FOLDERS = {
    "benchmark": "What `evaluate.benchmarks` and `prism-deco evaluate` take: names, separated by commas, or groups of "
    "them. `benchmark.NAME.KEY=VALUE` sets a key of one.",
    "sweep": "What `prism-deco sweep` and `plan` take: a grid of runs.",
}


def _key_table(group: str) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in reference().values():
        if key.name.rpartition(".")[0] == group:
            cells = [f"`{key.name}`", key.takes, f"`{key.default}`" if key.default else "", key.meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _choice_table(group: str) -> str:
    """The choices of a group, each with the first sentence of its YAML's first comment."""
    lines = ["| choice | |", "|---|---|"]
    for choice in choices(group):
        comment = []
        for line in choice_path(group, choice).read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            comment.append(line.removeprefix("# "))
        text = " ".join(comment).replace("|", "\\|")
        lines.append(f"| [`{choice}`]({group}/{choice}.yaml) | {text} |")
    return "\n" + "\n".join(lines) + "\n"
