"""The miniature world: rendered images and conversations about them, deterministic and offline."""

from prism_deco.data.shapes.captions import captions
from prism_deco.data.shapes.conversations import corpus
from prism_deco.data.shapes.source import shapes
from prism_deco.data.shapes.world import build_world

__all__ = ["build_world", "captions", "corpus", "shapes"]
