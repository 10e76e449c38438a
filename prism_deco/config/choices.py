"""The shipped YAMLs, one per choice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_deco.config.parse import read_yaml
from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError

# In a wheel conf/ lies inside the package, in a checkout next to it.
_PACKAGE = Path(__file__).parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

PROMPT_SETS = "prompt_sets"
"""Key of an LLM's YAML; see `with_set`."""

YAML_SUFFIXES = (".yaml", ".yml")


def choices(group: str) -> list[str]:
    """Names of the shipped YAMLs of a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def choice_path(group: str, choice: str) -> Path:
    """The YAML of a choice: a shipped name, or the path of a user's own file, which ends in `.yaml` or `.yml`."""
    return Path(choice) if choice.endswith(YAML_SUFFIXES) else CONF_DIR / group / f"{choice}.yaml"


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of a choice's YAML, plus its `name`. References such as `${recipe.num_tokens}` are left as they are.

    Args:
        choice: a name under `conf/<group>`, or the path of a YAML.

    Raises:
        UsageError: there is no such choice or file, or it is not valid YAML.
    """
    path = choice_path(group, choice)
    if not path.is_file():
        if choice.endswith(YAML_SUFFIXES):
            raise UsageError(f"{group}={choice}: there is no such file.")
        raise unknown(group, choice, choices(group))
    return {"name": path.stem} | read_yaml(path, group)


def default_contents(chosen: Mapping[str, str]) -> dict[str, Any]:
    """What `conf/config.yaml` composes: the content of each group's choice, and the values of other keys.

    Args:
        chosen: choices by group that replace its own.
    """
    content = read_yaml(CONF_DIR / "config.yaml")
    names = content.pop("defaults") | chosen
    return content | {group: load_choice(group, name) for group, name in names.items()}


def with_set(contents: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The contents of groups with one of the LLM's prompt sets in place.

    Prompt sets are the ways to talk to a language model that its YAML offers besides the format it begins with:

        prompt_sets:
          deco:                     # chosen by recipe.prompt_set=deco
            chat_template: ...      # replaces this key of the LLM, as any other here does
            recipe:                 # replaces keys of the recipe
              max_text_tokens: 2048

    They are resolved below what files and the command line set, and a composed configuration has the values alone.

    Args:
        name: of the set; None leaves the LLM's own format.

    Raises:
        UsageError: the LLM does not offer the set.
    """
    llm = dict(contents["llm"])
    sets = llm.pop(PROMPT_SETS, None) or {}
    if name is None:
        return {**contents, "llm": llm}
    if name not in sets:
        raise UsageError(
            f"llm={llm.get('name')} has no prompt set {name!r} (its YAML offers {', '.join(sets) or 'none'}): set "
            "recipe.prompt_set=null for the format of its own, or choose another LLM."
        )
    own = dict(sets[name])
    recipe = {**contents.get("recipe", {}), **(own.pop("recipe", None) or {})}
    return {**contents, "llm": llm | own, "recipe": recipe}
