"""Exact-name registries: a component adds itself by its own file, nobody keeps a list."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from prism_deco.errors import UsageError

T = TypeVar("T")
Own = TypeVar("Own")
"""A component's own type: decorating a class must not make it its base class to type checkers."""

_LISTED = 40
"""Choices that a message lists."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> UsageError:
    """The error for a name that is not among the choices: nearest names first, then all of them if they are few."""
    choices = sorted(choices)
    near = difflib.get_close_matches(name, choices, n=3)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    listed = ", ".join(choices[:_LISTED]) or "none"
    more = f" and {len(choices) - _LISTED} more" if len(choices) > _LISTED else ""
    return UsageError(f"Unknown {kind} {name!r}.{hint} Choices: {listed}{more}.")


class Registry(Generic[T]):
    """Maps exact names to components of one kind.

    Args:
        kind: what the components are, for error messages ("projector").
        package: the package whose modules are imported on the first look-up, so that dropping a
            file into it is all a new component needs. Components from outside register themselves
            when their module is imported (the `plugins` list of the configuration).
        also: modules elsewhere that are imported with them.
    """

    def __init__(self, kind: str, package: str | None = None, also: Iterable[str] = ()):
        self.kind = kind
        self._package = package
        self._also = tuple(also)
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[Own], Own]:
        """Decorator that registers its target under `name`; a name can be taken once."""

        def add(entry: Own) -> Own:
            if name in self._entries:
                raise UsageError(f"The {self.kind} {name!r} is registered twice: choose another name.")
            self._entries[name] = cast(Any, entry)
            return entry

        return add

    def get(self, name: str) -> T:
        """The component of that exact name; `UsageError` lists the choices otherwise."""
        module = f"{self._package}.{name}"
        # Most components have a module of their name, and need no other.
        if name not in self._entries and name.isidentifier() and self._package and importlib.util.find_spec(module):
            importlib.import_module(module)
        if name not in self._entries:
            self._discover()
        if name not in self._entries:
            raise unknown(self.kind, name, self._entries)
        return self._entries[name]

    def build(self, name: str, /, **options: Any) -> Any:
        """What the component of that name, a class or a function, makes of options.

        Raises:
            UsageError: an unknown name, an option that the component does not take, or one that it needs is missing.
        """
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
        if self._package is not None:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__, prefix=f"{self._package}."):
                importlib.import_module(module.name)
        for name in self._also:
            importlib.import_module(name)


def require_imported(modules: Iterable[str], origin: Path) -> None:
    """`UsageError` where a stored configuration names plug-ins that nobody has imported: opening a folder must not run
    the code that its author chose."""
    missing = [module for module in modules if module not in sys.modules]
    if missing:
        names = ",".join(missing)
        raise UsageError(
            f"{origin} names plug-in modules: {names}. They are not imported unless you name them yourself, since that "
            f"runs their code: plugins=[{names}] on the command line, load(..., plugins={missing}) in Python."
        )


def import_plugins(modules: Iterable[str]) -> None:
    """Imports the modules by which components from outside the package register themselves."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"The plug-in module {module!r} cannot be imported ({error}). Install it, or put its folder on "
                "PYTHONPATH."
            ) from error
