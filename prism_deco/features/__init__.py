"""The cache of frozen features: what the towers say of each image, computed once and shared by every run that can.

The towers are frozen and images are not augmented, so that their features are the same in every epoch, for every seed
and in every cell of a sweep that has the same towers and data. They lie under `cache_dir()/features/<key>/`.
"""

from prism_deco.features.backbone import at_rest
from prism_deco.features.cache import FeatureCache, image_names
from prism_deco.features.key import COMPUTE, Key, Layout

__all__ = ["COMPUTE", "FeatureCache", "Key", "Layout", "at_rest", "image_names"]
