"""Query-to-Patch: which patches each visual token comes from; one file per kind of projector."""

# Imported to register themselves with `trace`.
from prism_deco.explain.query_maps import chosen, d_abstractor, maxpool, qformer, resampler, window_attention  # noqa: F401
from prism_deco.explain.query_maps.base import QueryMaps, trace

__all__ = ["QueryMaps", "trace"]
