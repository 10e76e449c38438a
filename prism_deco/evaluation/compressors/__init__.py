"""Training-free compressors, which reduce the visual tokens of a model trained on all patches. One file each."""

from prism_deco.evaluation.compressors.base import COMPRESSORS, compress

__all__ = ["COMPRESSORS", "compress"]
