"""Training-free compressors: fewer visual tokens from a model that was trained on all patches. One file each."""

from prism_deco.evaluation.compressors.base import COMPRESSORS, compress

__all__ = ["COMPRESSORS", "compress"]
