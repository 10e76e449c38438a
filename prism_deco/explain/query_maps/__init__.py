"""Which patches each visual token came from: one file per kind of projector."""

from prism_deco.explain.query_maps import d_abstractor, maxpool, qformer
from prism_deco.explain.query_maps.base import QueryMaps, trace
from prism_deco.explain.query_maps.gradient import structural_bound

__all__ = ["QueryMaps", "d_abstractor", "maxpool", "qformer", "structural_bound", "trace"]
