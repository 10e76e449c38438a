"""R-GAE: where in the image a model looked for each word of its answer."""

from prism_deco.explain.gae import METHODS, Relevance, relevance
from prism_deco.explain.page import Panel, Section, side_by_side, write_page
from prism_deco.explain.run import ExplainExample, explain_image, explain_set
from prism_deco.explain.table import MapTable

__all__ = [
    "METHODS",
    "ExplainExample",
    "MapTable",
    "Panel",
    "Relevance",
    "Section",
    "explain_image",
    "explain_set",
    "relevance",
    "side_by_side",
    "write_page",
]
