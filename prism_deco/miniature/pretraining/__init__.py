"""Makes the towers of the miniature study out of its own images and captions."""

from prism_deco.miniature.pretraining.objectives import OBJECTIVES, Objective
from prism_deco.miniature.pretraining.towers import mini_towers, pretrain_tower

__all__ = ["OBJECTIVES", "Objective", "mini_towers", "pretrain_tower"]
