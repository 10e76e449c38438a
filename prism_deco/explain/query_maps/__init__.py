"""Which patches each visual token came from: one file per kind of projector."""

from prism_deco.explain.query_maps import chosen, d_abstractor, maxpool, qformer, resampler, window_attention
from prism_deco.explain.query_maps.base import QueryMaps, trace
from prism_deco.explain.query_maps.gradient import structural_bound

__all__ = [
    "QueryMaps",
    "chosen",
    "d_abstractor",
    "maxpool",
    "qformer",
    "resampler",
    "structural_bound",
    "trace",
    "window_attention",
]
