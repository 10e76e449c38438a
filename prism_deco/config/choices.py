"""Finds and reads the YAML of a choice, and expands groups of benchmarks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from prism_deco.config.registry import unknown
from prism_deco.config.schema import AS_TRAINED
from prism_deco.config.values import read_yaml
from prism_deco.errors import UsageError
from prism_deco.files import refusals_named

# A wheel has conf/ inside the package, a checkout next to it.
_PACKAGE = Path(__file__).parents[1]
CONF_DIR = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

PROMPT_SETS = "prompt_sets"
"""Key of an LLM's YAML; see `with_set`."""

YAML_SUFFIXES = (".yaml", ".yml")

_PLUGINS = "plugins"
"""Key of any choice's YAML; see `plugins_of`."""


def choices(group: str) -> list[str]:
    """Names of the shipped YAMLs of a group."""
    return sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))


def choice_path(group: str, choice: str) -> Path:
    """The YAML of a choice, which is a shipped name or the path of a user's own `.yaml` or `.yml` file."""
    return Path(choice) if choice.endswith(YAML_SUFFIXES) else CONF_DIR / group / f"{choice}.yaml"


def load_choice(group: str, choice: str) -> dict[str, Any]:
    """The content of a choice's YAML, plus its `name` and without its `plugins`. References such as
    `${recipe.num_tokens}` stay unresolved.

    Args:
        choice: a name under `conf/<group>`, or the path of a YAML.
    """
    path = choice_path(group, choice)
    with refusals_named(path, f"Name a choice of {group}."):
        is_there = path.is_file()
    if not is_there:
        if choice.endswith(YAML_SUFFIXES):
            raise UsageError(f"{group}={choice}: there is no such file.")
        raise unknown(group, choice, choices(group))
    content = {"name": path.stem} | read_yaml(path, group)
    content.pop(_PLUGINS, None)
    return content


def plugins_of(group: str, chosen: str) -> list[str]:
    """The plug-in modules that the YAMLs of choices list under `plugins`, to register their components.

    Args:
        chosen: one or more choices, separated by commas. They must come from the user: these modules are imported.
    """
    modules: list[str] = []
    for choice in _split(chosen):
        path = choice_path(group, choice)
        named = read_yaml(path, group).get(_PLUGINS) or [] if path.is_file() else []
        if not isinstance(named, list) or not all(isinstance(module, str) for module in named):
            raise UsageError(f"{path}: plugins must be a list of modules such as [a, b], not {named!r}.")
        modules += named
    return modules


def default_contents(chosen: Mapping[str, str]) -> dict[str, Any]:
    """The defaults of `conf/config.yaml`: the content of each group's choice, and the values of other keys.

    Args:
        chosen: replaces default choices, by group.
    """
    content = read_yaml(CONF_DIR / "config.yaml")
    names = content.pop("defaults") | chosen
    return content | {group: load_choice(group, name) for group, name in names.items()}


def with_set(contents: Mapping[str, Any], name: str | None) -> dict[str, Any]:
    """The contents of groups with one of the LLM's prompt sets applied.

    Prompt sets are alternatives to the prompt format of an LLM's YAML:

        prompt_sets:
          deco:                     # chosen by recipe.prompt_set=deco
            chat_template: ...      # replaces a key of the LLM, as do all others except `recipe`
            recipe:                 # replaces keys of the recipe
              max_text_tokens: 2048

    YAML files and the command line override these values.

    Args:
        name: of the set; None keeps the LLM's default format.
    """
    llm = dict(contents["llm"])
    sets = llm.pop(PROMPT_SETS, None) or {}
    if name is None:
        return {**contents, "llm": llm}
    if name not in sets:
        raise UsageError(
            f"llm={llm.get('name')} has no prompt set {name!r} (its YAML offers {', '.join(sets) or 'none'}): set "
            "recipe.prompt_set=null for its own format, or choose another LLM."
        )
    own = dict(sets[name])
    recipe = {**contents.get("recipe", {}), **(own.pop("recipe", None) or {})}
    return {**contents, "llm": llm | own, "recipe": recipe}


def resolve_benchmarks(names: str | Iterable[str], parents: tuple[str, ...] = ()) -> list[str]:
    """Expands benchmark groups (YAMLs with `members`) into names; each once, in order.

    Args:
        names: a list, or a comma-separated string with or without brackets.
        parents: the groups that contain these names.

    Raises:
        UsageError: an unknown name, or groups that contain each other.
    """
    found: list[str] = []
    for name in _split(names):
        if name in parents:
            raise UsageError(f"The benchmark groups {' > '.join((*parents, name))} contain each other.")
        members = load_choice("benchmark", name).get("members")
        found += [name] if members is None else resolve_benchmarks(members, (*parents, name))
    return list(dict.fromkeys(found))


def group_keys(names: str | Iterable[str]) -> dict[str, dict[str, Any]]:
    """The keys that benchmark groups set for their members (`keys` in a group's YAML), by benchmark: how a table of the
    paper asks them, for example. A group overrides the groups that it contains.

    Raises:
        UsageError: two groups set different keys for one benchmark.
    """
    found: dict[str, dict[str, Any]] = {}
    origins: dict[str, str] = {}
    for name in _split(names):
        content = load_choice("benchmark", name)
        own = group_keys(content.get("members") or [])
        for benchmark, keys in (content.get("keys") or {}).items():
            own[benchmark] = own.get(benchmark, {}) | keys
        for benchmark, keys in own.items():
            if found.setdefault(benchmark, keys) != keys:
                raise UsageError(
                    f"{origins[benchmark]} and {name} ask {benchmark} in different ways ({found[benchmark]} and "
                    f"{keys}): score a run on one of them, then on the other with `prism-deco evaluate --out=FOLDER`."
                )
            origins[benchmark] = name
    return found


def _split(names: str | Iterable[str]) -> list[str]:
    if not isinstance(names, str):
        return list(names)
    found = [name.strip(" '\"") for name in names.strip("[] ").split(",")]
    return [name for name in found if name]


def choice_name(choice: str) -> str:
    """The name of a choice that is given by name or by the path of its YAML."""
    return Path(choice).stem if choice.endswith(YAML_SUFFIXES) else choice


TOKENS = "tokens.json"
"""File next to a run's results with the number of visual tokens and the time to the first token."""


def results_name(choice: str, split: str | None, ask: str = AS_TRAINED) -> str:
    """The name of a benchmark's results folder: the benchmark, its split unless it is the YAML's, and the way to ask
    unless it is `as_trained`."""
    own = load_choice("benchmark", choice).get("split") or ""
    parts = [choice_name(choice)]
    if split not in (None, own):
        parts.append(str(split))
    if ask != AS_TRAINED:
        parts.append(ask)
    return "-".join(parts)


def resolve_asks(names: str) -> list[str]:
    """The ways to ask that `evaluate.ask` lists, each once, in order."""
    return list(dict.fromkeys(_split(names))) or [AS_TRAINED]
