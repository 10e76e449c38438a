"""Registries of components by exact name. Components register themselves: there is no central list."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from prism_deco.errors import UsageError

T = TypeVar("T")
Own = TypeVar("Own")
"""The type of the decorated component, which `register` preserves for type checkers."""

_LISTED = 40
"""Most choices that a message lists."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not among the choices: suggests similar ones and lists the first `_LISTED`."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = ", ".join(choices[:_LISTED]) or "none"
    more = f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else ""
    return UsageError(f"Unknown {kind} {name!r}.{hint} Choices: {listed}{more}.")


@dataclass(eq=False)
class Registry(Generic[T]):
    """Maps exact names to components of one kind.

    Attributes:
        kind: what the components are, for error messages ("projector").
        package: its modules are imported when a name is looked up, so a new component only needs a file there.
            Components outside the package register when their module is imported (`plugins` in the configuration).
        also: further modules to import.
    """

    kind: str
    package: str | None = None
    also: Sequence[str] = ()
    _entries: dict[str, T] = field(default_factory=dict, init=False, repr=False)

    def register(self, name: str) -> Callable[[Own], Own]:
        """Decorator that registers its target under `name`, which must be new."""

        def add(entry: Own) -> Own:
            if name in self._entries:
                raise UsageError(f"The {self.kind} {name!r} is registered twice: choose another name.")
            self._entries[name] = cast(Any, entry)
            return entry

        return add

    def get(self, name: str) -> T:
        """The component of that exact name; raises `UsageError` with the choices if there is none."""
        module = f"{self.package}.{name}"
        # Most components are in a module of their name: try it before importing the whole package.
        if name not in self._entries and name.isidentifier() and self.package and importlib.util.find_spec(module):
            importlib.import_module(module)
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def build(self, name: str, /, **options: Any) -> Any:
        """Calls the component of that name, a class or a function, with these options."""
        component = self.get(name)
        parameters = inspect.signature(component).parameters  # type: ignore[arg-type]
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for option in options:
            if option not in parameters and not takes_any:
                raise unknown(f"key of the {self.kind} {name}", option, parameters.keys() - options.keys())
        for parameter in parameters.values():
            is_named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
            if is_named and parameter.default is parameter.empty and parameter.name not in options:
                raise UsageError(f"The {self.kind} {name!r} needs the key {parameter.name}: set it in its YAML.")
        return component(**options)  # type: ignore[operator]

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def _discover(self) -> None:
        if self.package is not None:
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__, prefix=f"{self.package}."):
                importlib.import_module(module.name)
        for name in self.also:
            importlib.import_module(name)


def require_imported(modules: Iterable[str], origin: Path) -> None:
    """Raises `UsageError` if a stored configuration names plug-ins that are not imported yet: opening a folder must not
    run code of its author's choice."""
    missing = [module for module in modules if module not in sys.modules]
    if missing:
        names = ",".join(missing)
        raise UsageError(
            f"{origin} names plug-in modules: {names}. They are not imported unless you name them yourself, since that "
            f"runs their code: plugins=[{names}] on the command line, load(..., plugins={missing}) in Python."
        )


def import_plugins(modules: Iterable[str]) -> None:
    """Imports plug-in modules, which register their components."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"The plug-in module {module!r} cannot be imported ({error}). Install it, or put its folder on "
                "PYTHONPATH."
            ) from error
