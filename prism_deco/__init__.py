"""Single-stage, PRISM-style training of vision-language models around DeCo's token compression."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_deco.api import Model, load

__all__ = ["Model", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily, so that `import prism_deco.config` and `prism-deco --help` stay light.
    if name in __all__:
        from prism_deco import api

        return getattr(api, name)
    raise AttributeError(f"module 'prism_deco' has no attribute {name!r}")
