"""`prism-deco keys` and `train --print`: the available keys, and the values of a command line."""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence

from prism_deco.config import GROUPS, choices, flat, load_choice, load_config, value_origins, value_text
from prism_deco.config.choices import choice_path
from prism_deco.config.reference import OTHER_FOLDERS, Key, reference, reference_page
from prism_deco.config.registry import unknown
from prism_deco.stages import Stage


def keys_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "group",
        nargs="?",
        help=f"{', '.join(_groups())}, a key, or GROUP=CHOICE for the YAML of a choice (default: all groups)",
    )
    parser.add_argument("--markdown", action="store_true", help="print all keys and choices as in conf/README.md")


def keys(args: argparse.Namespace) -> None:
    """List the keys of the configuration with types, defaults and meanings, all, those of one group, or one. A key that
    only some choices have is explained in their YAML files, which GROUP=CHOICE prints."""
    if args.markdown:
        sys.stdout.write(reference_page())
        return
    group, is_choice, choice = (args.group or "").partition("=")
    # The argument is a key, a group, or GROUP=CHOICE. A name that is both counts as a group.
    if group in reference() and group not in _groups():
        sys.stdout.write("\n".join(_meaning(reference()[group], _width())) + "\n")
        return
    if group and group not in _groups():
        siblings = [key for key in reference() if key.startswith(f"{group.partition('.')[0]}.")]
        raise unknown("key", group, siblings) if siblings else unknown("group", group, _groups())
    if is_choice:
        load_choice(group, choice)
        path = choice_path(group, choice)
        sys.stdout.write(f"# {path}\n{path.read_text(encoding='utf-8')}")
        return
    # The group "" holds the keys of the run itself, without a dot.
    for name in [group] if group else [*_groups(), ""]:
        sys.stdout.write(_explained(name))


def _groups() -> list[str]:
    return [*GROUPS, "evaluate", *OTHER_FOLDERS]


def _width() -> int:
    return min(shutil.get_terminal_size().columns, 100)


def _explained(group: str) -> str:
    """The keys of a group, each with its meaning below it, wrapped to the terminal's width."""
    width = _width()
    heading = group or "the run"
    if group in GROUPS:
        heading += f": {group}=NAME chooses one of {', '.join(choices(group))}, or a YAML file"
    if group in OTHER_FOLDERS:
        heading += f": {OTHER_FOLDERS[group]} Choices: {', '.join(choices(group))}, or a YAML file"
    lines = textwrap.wrap(heading, width)
    for key in reference().values():
        if key.name.rpartition(".")[0] == group:
            lines += _meaning(key, width)
    return "\n".join(lines) + "\n\n"


def _meaning(key: Key, width: int) -> list[str]:
    default = f" (default {key.default})" if key.default else ""
    deep = {"width": width, "subsequent_indent": "      "}
    first = textwrap.wrap(f"{key.name}: {key.takes}{default}", initial_indent="  ", **deep)
    return first + textwrap.wrap(key.meaning, initial_indent="      ", **deep)


def print_config(stages: Sequence[Stage], arguments: Sequence[str]) -> None:
    """Prints the configuration of a command line, or of each stage, as YAML with the origin of each value as a comment.
    `train` accepts the output of a single run as a file."""
    for name, given in [(stage.name, stage.arguments) for stage in stages] or [("", arguments)]:
        if name:
            sys.stdout.write(f"# stage {name}\n")
        sys.stdout.write(_as_yaml(given))


def _as_yaml(arguments: Sequence[str]) -> str:
    origins = value_origins(arguments)
    lines: list[tuple[str, str]] = []
    opened: list[str] = []
    for key, value in flat(load_config(arguments)).items():
        # Close the mappings that the key is not in, then open those that it is in.
        *parents, leaf = key.split(".")
        while opened != parents[: len(opened)]:
            opened.pop()
        for parent in parents[len(opened) :]:
            lines.append((f"{'  ' * len(opened)}{parent}:", ""))
            opened.append(parent)
        lines.append((f"{'  ' * len(opened)}{leaf}: {value_text(key, value, is_text=False)}", origins[key]))
    # Origins stand in one column, as far right as the longest value needs, but not beyond column 60.
    width = min(max(len(text) for text, origin in lines if origin), 60)
    return "".join(f"{text:{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)
