"""Deletion and insertion, localisation, diversity and intervals, against hand-made cases and slow loops."""

import math

import numpy as np
import pytest
import torch

from prism_deco.backbones.transforms import letterbox
from prism_deco.bootstrap import mean_interval
from prism_deco.explain.geometry import PatchFrame
from prism_deco.explain.measures import (
    area,
    curves,
    energy_in_box,
    padding_fraction,
    pointing_hit,
    redundancy,
    spread,
)
from prism_deco.explain.words import encode_answer
from prism_deco.sequence import build_batch

PATCHES = PatchFrame(letterbox((80, 40), 64), (8, 8), 8)  # 10 px of the image per patch, 20 px of padding


def one_hot(row, column):
    values = torch.zeros(64)
    values[row * 8 + column] = 1
    return values


def test_energy_is_the_share_of_the_map_inside_the_box():
    box = (20.0, 10.0, 40.0, 20.0)  # patches of row 3, columns 2 and 3
    assert energy_in_box(one_hot(3, 2) + one_hot(3, 3) + 2 * one_hot(0, 0), PATCHES, box) == pytest.approx(0.5)
    assert energy_in_box(torch.ones(64), PATCHES, box) == pytest.approx(2 / 64)
    assert energy_in_box(one_hot(3, 2), PATCHES, (25.0, 10.0, 40.0, 15.0)) == pytest.approx(0.25)
    assert energy_in_box(torch.zeros(64), PATCHES, box) == 0


def test_relevance_in_the_padding_is_a_fraction_of_the_map():
    # The image covers rows 2 to 5 of the 8 x 8 patches.
    assert padding_fraction(one_hot(3, 3) + 3 * one_hot(0, 4), PATCHES) == pytest.approx(0.75)
    assert padding_fraction(torch.ones(64), PATCHES) == pytest.approx(0.5)
    assert padding_fraction(torch.zeros(64), PATCHES) == 0


def test_pointing_asks_where_the_maximum_is():
    box = (20.0, 10.0, 40.0, 20.0)
    assert pointing_hit(one_hot(3, 3) + 0.9, PATCHES, box) and not pointing_hit(one_hot(2, 3), PATCHES, box)
    small = (31.0, 12.0, 34.0, 14.0)  # holds no patch's centre
    assert pointing_hit(one_hot(3, 3), PATCHES, small) and not pointing_hit(one_hot(3, 2), PATCHES, small)


def test_redundancy_is_the_mean_cosine_of_pairs():
    maps = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    pairs = [float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for i, a in enumerate(maps) for b in maps[i + 1 :]]
    assert redundancy(maps) == pytest.approx(sum(pairs) / 10)
    assert redundancy(torch.eye(4)) == 0 and redundancy(torch.ones(3, 4)) == pytest.approx(1)
    assert redundancy(torch.ones(1, 4)) == 0


def test_spread_is_the_distance_from_the_centre_of_mass():
    corners = torch.zeros(1, 64)
    corners[0, 0] = corners[0, 7] = 1
    assert spread(corners, (8, 8)) == pytest.approx(3.5 / 8)
    assert spread(torch.eye(64), (8, 8)) == pytest.approx(0, abs=1e-3)
    everywhere = math.sqrt(2 * sum(((k + 0.5) / 8 - 0.5) ** 2 for k in range(8)) / 8)
    assert spread(torch.ones(1, 64), (8, 8)) == pytest.approx(everywhere)
    assert spread(torch.cat([torch.zeros(3, 64), corners]), (8, 8)) == pytest.approx(3.5 / 8)


def test_intervals_are_those_of_the_mean():
    sample = np.random.default_rng(3).normal(2, 1, 400)
    result = mean_interval(sample.tolist())
    assert result["mean"] == pytest.approx(sample.mean()) and result["n"] == 400
    low, high = result["interval95"]
    half = 1.96 * sample.std() / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.02) and high == pytest.approx(
        sample.mean() + half, abs=0.02
    )


def test_area_is_the_trapezoid_sum():
    assert area(torch.tensor([1.0, 0.5, 0.0, 0.0])) == pytest.approx((0.75 + 0.25 + 0) / 3)


@pytest.mark.parametrize("backbone", ["mini_siglip", "mini_dinov2_siglip"])
def test_curves_are_the_answer_s_probability_as_patches_go_and_come(small, picture, backbone):
    vlm, llm = small(projector="linear", backbone=backbone)
    encoded, ids = encode_answer(llm, "What color?", "a red cross", 64)
    pixels = {tower: x[None].double() for tower, x in vlm.backbone.transform(picture).items()}
    scores = torch.randperm(64, generator=torch.Generator().manual_seed(5)).float()
    deletion, insertion = curves(vlm, encoded, len(ids), pixels, scores, steps=4, batch_size=3)
    order = scores.argsort(descending=True).tolist()
    for k in range(5):
        for curve, chosen in ((deletion, order[16 * k :]), (insertion, order[: 16 * k])):
            masked = {tower: torch.zeros_like(x) for tower, x in pixels.items()}
            for n in chosen:
                window = (..., slice(8 * (n // 8), 8 * (n // 8) + 8), slice(8 * (n % 8), 8 * (n % 8) + 8))
                for tower, x in pixels.items():
                    masked[tower][window] = x[window]
            batch = build_batch([encoded], 64, pixels=masked)
            with torch.no_grad():
                log_probabilities = vlm.logits(vlm.hidden_states(batch))[0].float().log_softmax(dim=-1)
            at = [p for p, label in enumerate(batch.labels[0].tolist()) if label != -100][: len(ids)]
            expected = np.mean([math.exp(log_probabilities[p - 1, token]) for p, token in zip(at, ids, strict=True)])
            assert float(curve[k]) == pytest.approx(expected, rel=1e-5)
    assert deletion[0] == pytest.approx(float(insertion[-1]))
    assert len(set(deletion.tolist())) == 5
