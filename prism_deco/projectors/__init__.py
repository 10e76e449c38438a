"""Projectors: patch features -> visual tokens. One file each; `build_projector` builds them by name."""

from prism_deco.projectors.base import PROJECTORS, Projector, build_projector, square_grid

__all__ = ["PROJECTORS", "Projector", "build_projector", "square_grid"]
