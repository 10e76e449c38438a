"""`conf/README.md`: how a configuration is composed, every key and every choice."""

from __future__ import annotations

from pathlib import Path

from prism_deco.config.choices import choice_path, choices
from prism_deco.config.reference import reference
from prism_deco.config.schema import GROUPS

_INTRODUCTION = """\
# Configuration

`prism-deco train` composes a run from one choice per group, each a YAML file in a folder of this one, and from single
settings:

```bash
prism-deco train projector=c_abstractor projector.depth=2 recipe=mine.yaml seed=3
```

`config.yaml` names the default choices. `GROUP=NAME` takes another one, `GROUP=FILE.yaml` a file of your own,
`GROUP.KEY=VALUE` sets a key. A YAML file without `GROUP=`, such as a run's `config.yaml`, sets several at once; the
command line wins over it. `prism-deco train --print` shows the result and where each value comes from.

The tables list the keys that all choices of a group share, their types, and the defaults of the schema, which a
choice's YAML replaces. Keys that only some choices have are explained in their YAML files. A value such as
`${recipe.num_tokens}` is a reference to another key. This page is generated: `prism-deco keys --markdown`.
"""

_OTHER_FOLDERS = {
    "benchmark": "What `evaluate.benchmarks` and `prism-deco evaluate` take: names, separated by commas, or groups of "
    "them. `benchmark.NAME.KEY=VALUE` sets a key of one.",
    "sweep": "What `prism-deco sweep` and `plan` take: a grid of runs.",
}


def reference_page() -> str:
    """The page, in Markdown."""
    sections = [_INTRODUCTION]
    for group in (*GROUPS, "evaluate", ""):
        title = f"`{group}`" if group else "The run"
        sections.append(f"## {title}\n\n{_key_table(group)}{_choice_table(group) if group in GROUPS else ''}")
    for folder, text in _OTHER_FOLDERS.items():
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
    """The lines of a YAML's first comment, up to one that ends a sentence."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words.append(line.removeprefix("# "))
        if line.endswith("."):
            break
    return " ".join(words)
