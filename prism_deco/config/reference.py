"""The keys of the configuration with their types, defaults and meanings, and the page `conf/README.md` about them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import MISSING as UNSET
from dataclasses import Field, dataclass
from functools import cache
from pathlib import Path

from omegaconf import MISSING

from prism_deco.config import schema
from prism_deco.config.choices import choice_path, choices
from prism_deco.config.fields import Range
from prism_deco.config.schema import GROUPS
from prism_deco.config.values import schema_keys, type_text, value_text


@dataclass(frozen=True)
class Key:
    """A key of the configuration (`recipe.lr`), the values it takes, its default, and its meaning."""

    name: str
    takes: str
    default: str
    meaning: str


@cache
def reference() -> dict[str, Key]:
    """All keys, in the schema's order."""
    meanings = _docstrings()
    keys = {}
    for name, member in schema_keys().items():
        default = member.default_factory() if member.default_factory is not UNSET else member.default
        text = "" if default == MISSING else value_text(name, default)
        keys[name] = Key(name, _takes(member), text, meanings[name])
    return keys


def _takes(member: Field) -> str:
    """The choices of a field, or its type and range, in words."""
    rule = member.metadata.get("allowed")
    kind = str(member.type)
    is_optional = kind.endswith(" | None")
    if isinstance(rule, tuple):
        return " | ".join((*rule, "null") if is_optional else rule)
    if isinstance(rule, Range):
        return f"{type_text(kind.removesuffix(' | None'))}, {rule}{', or null' if is_optional else ''}"
    return type_text(kind)


def _docstrings() -> dict[str, str]:
    """The docstring below each field of the schema's classes, on one line."""
    groups = {type(member).__name__: f"{name}." for name, member in vars(schema.Config()).items()}
    texts = {}
    for node in ast.parse(inspect.getsource(schema)).body:
        if isinstance(node, ast.ClassDef):
            prefix = groups.get(node.name, "")
            for statement, below in zip(node.body, node.body[1:], strict=False):
                if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                    text = ast.literal_eval(below.value)
                    texts[prefix + ast.unparse(statement.target)] = " ".join(text.split())
    return texts


_INTRODUCTION = """\
# Configuration

`prism-deco train` composes a run from one choice per group, each a YAML file in a folder of this one, and from single
settings:

```bash
prism-deco train projector=c_abstractor projector.depth=2 recipe=mine.yaml seed=3
```

`config.yaml` names the default choices. `GROUP=NAME` takes another one, `GROUP=FILE.yaml` a file of your own,
`GROUP.KEY=VALUE` sets a key. A YAML file without `GROUP=`, such as a run's `config.yaml`, sets several at once; the
command line overrides it. `prism-deco train --print` shows the result and where each value comes from.

The tables list the keys that all choices of a group share, their types, and the schema's defaults, which a choice's
YAML overrides. Keys of single choices are explained in their YAML files. A value such as
`${recipe.num_tokens}` is a reference to another key. This page is generated: `prism-deco keys --markdown`.
"""

OTHER_FOLDERS = {
    "benchmark": "Names for `evaluate.benchmarks` and `prism-deco evaluate`, separated by commas: benchmarks, or "
    "groups of them. `benchmark.NAME.KEY=VALUE` sets a key of one.",
    "sweep": "Grids of runs for `prism-deco sweep` and `prism-deco plan`.",
}


def reference_page() -> str:
    """The page, in Markdown."""
    sections = [_INTRODUCTION]
    for group in (*GROUPS, "evaluate", ""):
        title = f"`{group}`" if group else "The run"
        sections.append(f"## {title}\n\n{_key_table(group)}{_choice_table(group) if group in GROUPS else ''}")
    for folder, text in OTHER_FOLDERS.items():
        sections.append(f"## `{folder}`\n\n{text}\n{_choice_table(folder)}")
    return "\n".join(sections)


def _key_table(group: str) -> str:
    lines = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in reference().values():
        if key.name.rpartition(".")[0] == group:
            cells = [f"`{key.name}`", key.takes, f"`{key.default}`" if key.default else "", key.meaning]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _choice_table(group: str) -> str:
    lines = ["", "| choice | |", "|---|---|"]
    for choice in choices(group):
        text = _first_sentence(choice_path(group, choice)).replace("|", "\\|")
        lines.append(f"| [`{choice}`]({group}/{choice}.yaml) | {text} |")
    return "\n".join(lines) + "\n"


def _first_sentence(path: Path) -> str:
    """The lines of a YAML's first comment, up to the first that ends in a period."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line.removeprefix("# "))
        if line.endswith("."):
            break
    return " ".join(words)
