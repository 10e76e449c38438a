"""Linear probes of a tower's patch features: colours, shapes, digits, box edges.

The probes use the renderer's labels; no tower is trained on them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import torch
from captioned_images import normalise
from einops import rearrange, reduce
from torch import Tensor

from prism_deco.backbones import VisionBackbone
from prism_deco.miniature.render import render
from prism_deco.miniature.scene import COLORS, SHAPES, Scene, draw_scene

_RIDGE = 1e-4


@dataclass(frozen=True)
class Probe:
    """Held-out accuracy of ridge regression on frozen features (standardised, one probe per quantity).

    `color`, `shape` and `large` are read from single patches on an object, `digits` from the mean of a plate's patches.
    `edge_px` is read from the 2x2-pooled cell that contains an object's centre: the mean absolute error, in pixels, of
    the object's four edges relative to the cell's centre.
    """

    color: float
    shape: float
    large: float
    digits: float
    edge_px: float

    def as_dict(self) -> dict[str, float]:
        """The values, rounded for the record."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def probe(backbone: VisionBackbone, seed: int, train: int, test: int) -> Probe:
    """Fits the probes on `train` scenes and evaluates them on `test` others."""
    scenes = [draw_scene(seed, "probe", index) for index in range(train + test)]
    features = _features(backbone, scenes)
    parts = (slice(0, train), slice(train, None))
    color, shape, large = (
        _accuracy(*(_patch_labels(scenes[part], features[part], backbone.patch_size, kind) for part in parts))
        for kind in ("color", "shape", "size_word")
    )
    digits = np.mean(
        [
            _accuracy(*(_plates(scenes[part], features[part], backbone.patch_size, place) for part in parts))
            for place in (10, 1)
        ]
    )
    (x, edges), (x_test, edges_test) = (_edges(scenes[p], features[p], backbone.patch_size) for p in parts)
    error = (_ridge(x, edges, x_test) - edges_test).abs().mean().item()
    return Probe(color, shape, large, float(digits), error)


@torch.no_grad()
def _features(backbone: VisionBackbone, scenes: list[Scene]) -> Tensor:
    """float[n, h, w, D]."""
    (name,) = backbone.towers
    transform = backbone.transform.towers[name]
    images = rearrange(torch.from_numpy(np.stack([render(scene) for scene in scenes])), "n h w c -> n c h w")
    batches = [backbone({name: normalise(batch, transform.mean, transform.std)}) for batch in images.split(250)]
    return rearrange(torch.cat(batches), "n (h w) d -> n h w d", h=backbone.grid[0])


def _patch_labels(scenes: list[Scene], features: Tensor, patch: int, kind: str) -> tuple[Tensor, Tensor]:
    """Patches whose centre lies in the middle half of an object's box, with the index of the object's attribute."""
    names = (*COLORS, *SHAPES, "small", "large")
    inputs, labels = [], []
    for scene, grid in zip(scenes, features, strict=True):
        for thing in scene.things:
            margin = thing.size / 4
            rows, columns = (
                _cells(low + margin, low + thing.size - margin, patch, grid.shape[0]) for low in (thing.y, thing.x)
            )
            cells = grid[rows][:, columns].reshape(-1, grid.shape[-1])
            inputs.append(cells)
            labels += [names.index(getattr(thing, kind))] * len(cells)
    return torch.cat(inputs), torch.tensor(labels)


def _plates(scenes: list[Scene], features: Tensor, patch: int, place: int) -> tuple[Tensor, Tensor]:
    """The mean of the patches whose centre lies on a plate, with the plate's digit (`place` 10: tens, 1: ones)."""
    inputs, labels = [], []
    for scene, grid in zip(scenes, features, strict=True):
        if scene.plate is not None:
            x1, y1, x2, y2 = scene.plate.box
            cells = grid[_cells(y1, y2, patch, grid.shape[0])][:, _cells(x1, x2, patch, grid.shape[1])]
            inputs.append(reduce(cells, "h w d -> d", "mean"))
            labels.append(scene.plate.number // place % 10)
    return torch.stack(inputs), torch.tensor(labels)


def _edges(scenes: list[Scene], features: Tensor, patch: int) -> tuple[Tensor, Tensor]:
    """Pooled cells that contain an object's centre, with the object's edges in pixels relative to the cell's centre."""
    pooled = reduce(features, "n (h a) (w b) d -> n h w d", "mean", a=2, b=2)
    inputs, targets = [], []
    for scene, grid in zip(scenes, pooled, strict=True):
        for thing in scene.things:
            x1, y1, x2, y2 = thing.box
            column, row = (x1 + x2) // (4 * patch), (y1 + y2) // (4 * patch)
            middle = torch.tensor([column, row, column, row]) * 2 * patch + patch
            inputs.append(grid[row, column])
            targets.append(torch.tensor(thing.box) - middle)
    return torch.stack(inputs), torch.stack(targets).float()


def _cells(low: float, high: float, patch: int, count: int) -> list[int]:
    """Indices of the patches along one axis whose centre lies in [low, high]."""
    return [cell for cell in range(count) if low <= cell * patch + patch / 2 <= high]


def _accuracy(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> float:
    one_hot = torch.nn.functional.one_hot(train[1]).float()
    return (_ridge(train[0], one_hot, test[0]).argmax(-1) == test[1]).float().mean().item()


def _ridge(x: Tensor, y: Tensor, x_test: Tensor) -> Tensor:
    """Predictions for `x_test` of a ridge regression with intercept, computed in float64."""
    mean, std = x.double().mean(0), x.double().std(0) + 1e-6
    x, x_test = ((part.double() - mean) / std for part in (x, x_test))
    offset = y.double().mean(0)
    gram = x.T @ x + _RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    return x_test @ torch.linalg.solve(gram, x.T @ (y.double() - offset)) + offset
