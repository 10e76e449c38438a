"""The miniature towers: what their objectives compute, what the probe measures, what is shipped."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch
from captioned_images import END, PAD, Vocabulary, load_captions, normalise, phrases
from contrastive import PhraseClipLoss, PhraseSigLipLoss, retrieval
from masked import MaskedPretraining, orientation_histograms
from pretrain import OBJECTIVES, pretrain_tower
from probe import Probe, probe
from safetensors.torch import load_file
from torch import nn

from prism_deco.backbones import VisionBackbone, build_backbone
from prism_deco.backbones.transforms import BackboneTransform, TowerTransform
from prism_deco.backbones.weights import ASSETS
from prism_deco.config import choices, load_choice
from prism_deco.miniature.render import render
from prism_deco.miniature.scene import draw_scene

CAPTION = "a small red circle at the top left, a large blue cross in the middle and a plate at the top that says 47"


def test_phrases_are_the_objects_of_a_caption():
    assert phrases(CAPTION) == [
        "a small red circle at the top left",
        "a large blue cross in the middle",
        "a plate at the top that says 47",
    ]


def test_vocabulary_reads_digits_one_by_one():
    vocabulary = Vocabulary(["says 47", "red"])
    ids = vocabulary.encode(["says 74", "red"], length=5)
    assert ids.tolist() == [[4, 2, 1, END, PAD], [3, END, PAD, PAD, PAD]]
    with pytest.raises(ValueError, match=r"unknown ones: \['blue'\]"):
        vocabulary.encode(["blue"], length=5)
    with pytest.raises(ValueError, match="more than 2 words"):
        vocabulary.encode(["red red red"], length=3)


def test_captioned_images_are_no_images_of_the_world():
    images, _ = load_captions(seed=3, count=50)
    shown = {image.permute(1, 2, 0).numpy().tobytes() for image in images}
    for split in ("train", "val", "test"):
        assert not shown & {render(draw_scene(3, split, index)).tobytes() for index in range(200)}


def test_normalise_equals_the_transform_of_the_tower():
    images, captions = load_captions(seed=5, count=2)
    assert images.shape == (2, 3, 64, 64) and images.dtype == torch.uint8 and len(captions) == 2
    from PIL import Image

    transform = TowerTransform(64, "letterbox", (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    expected = transform(Image.fromarray(images[0].permute(1, 2, 0).numpy()))
    torch.testing.assert_close(normalise(images, transform.mean, transform.std)[0], expected)


@pytest.fixture
def pairs():
    """Two images of three patches, five phrases, and which image has which."""
    torch.manual_seed(0)
    patches = nn.functional.normalize(torch.randn(2, 3, 4), dim=-1)
    texts = nn.functional.normalize(torch.randn(5, 4), dim=-1)
    positives = [[1, 1, 0, 1, 0], [0, 1, 0, 0, 1]]
    logits = [
        [math.log(sum(math.exp(3.0 * float(patches[i, p] @ texts[t])) for p in range(3))) for t in range(5)]
        for i in range(2)
    ]
    return patches, texts, positives, logits


def test_sigmoid_loss_by_a_slow_loop(pairs):
    patches, texts, positives, logits = pairs
    loss = PhraseSigLipLoss()
    loss.positives = torch.tensor(positives).bool()
    expected = 0.0
    for image in range(2):
        for phrase in range(5):
            sign = 1 if positives[image][phrase] else -1
            expected -= math.log(1 / (1 + math.exp(-sign * (logits[image][phrase] - 2.0)))) / 2
    assert loss(patches, texts, torch.tensor(3.0), torch.tensor(-2.0)).item() == pytest.approx(expected, rel=1e-5)


def test_softmax_loss_by_a_slow_loop(pairs):
    patches, texts, positives, logits = pairs
    positives = [[1, 1, 0, 1, 0], [0, 1, 1, 0, 1]]
    loss = PhraseClipLoss()
    loss.positives = torch.tensor(positives).bool()
    by_image = by_phrase = 0.0
    for i in range(2):
        total = sum(math.exp(logits[i][t]) for t in range(5))
        own = [t for t in range(5) if positives[i][t]]
        by_image -= sum(math.log(math.exp(logits[i][t]) / total) for t in own) / len(own) / 2
    for t in range(5):
        total = sum(math.exp(logits[i][t]) for i in range(2))
        own = [i for i in range(2) if positives[i][t]]
        by_phrase -= sum(math.log(math.exp(logits[i][t]) / total) for i in own) / len(own) / 5
    found = loss(patches, texts, torch.tensor(3.0)).item()
    assert found == pytest.approx((by_image + by_phrase) / 2, rel=1e-5)


def test_pixel_targets_are_the_neighbourhood_at_half_resolution():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    targets = MaskedPretraining("vit_tiny_stem_patch8_reg4_64", [], seed=0).pixel_targets(images)
    assert targets.shape == (1, 64, 3 * 12 * 12)
    window = images[0, :, 8 * 2 : 8 * 5, 8 * 4 : 8 * 7]  # around the patch in row 3, column 5
    expected = window.reshape(3, 12, 2, 12, 2).mean((2, 4)).flatten()
    expected = (expected - expected.mean()) / (expected.std() + 0.5)
    torch.testing.assert_close(targets[0, 3 * 8 + 5], expected)


def test_orientation_histograms_by_hand():
    """A vertical edge changes across (angle 0, first bin), a horizontal one down (90 degrees, fifth of nine bins)."""
    images = torch.zeros(2, 3, 8, 8)
    images[0, 1, :, 6:] = 2.0
    images[1, 0, 2:, :] = 4.0
    histograms = orientation_histograms(images)
    expected = torch.zeros(2, 9, 2, 2)
    # The central difference sees the edge from both sides: 2 of the 4 columns (rows) of a 4x4 cell.
    expected[0, 0, :, 1] = 2.0 * 2 / 4
    expected[1, 4, 0, :] = 4.0 * 2 / 4
    torch.testing.assert_close(histograms, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_few_images_can_be_learnt(name):
    torch.manual_seed(0)
    images, captions = load_captions(seed=1, count=6)
    objective = OBJECTIVES[name](load_choice("backbone", name)["model"], captions, 0)
    pixels = normalise(images, (0.5,) * 3, (0.5,) * 3)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    before = objective.eval().evaluate(pixels, captions)
    losses = []
    for _ in range(12):
        loss = objective.train()(pixels, captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[-3:]) < 0.8 * losses[0]
    assert {p.grad is None for p in objective.vit.blocks.parameters()} == {False}
    after = objective.eval().evaluate(pixels, captions)
    assert sum(after.values()) > sum(before.values())


def test_retrieval_figures_of_a_perfect_and_of_a_useless_tower():
    names = ["red", "blue", "green"]
    assert retrieval(torch.eye(3), names) == {"image_to_text": 1.0, "text_to_image": 1.0, "candidates": 3}
    # Every image takes the first caption, which is right for one of three.
    useless = torch.tensor([[1.0, 0, 0]] * 3)
    assert retrieval(useless, names)["image_to_text"] == pytest.approx(1 / 3)
    assert retrieval(useless, ["red", "red", "green"])["image_to_text"] == pytest.approx(2 / 3)


class Oracle(VisionBackbone):
    """A tower whose features are the mean colour of each patch."""

    def __init__(self):
        super().__init__()
        self.towers, self.image_size, self.patch_size, self.grid, self.embed_dim = ("oracle",), 64, 8, (8, 8), 3
        plain = TowerTransform(64, "letterbox", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.transform = BackboneTransform({"oracle": plain})

    def features(self, pixels):
        return nn.functional.avg_pool2d(pixels["oracle"], 8).flatten(2).transpose(1, 2)


def test_probe_reads_colours_from_colours_and_little_else():
    found = probe(Oracle(), seed=3, train=300, test=100)
    assert found.color > 0.7
    # Four shapes, two sizes, ten digits: mean colours say little of them.
    assert found.shape < 0.5 and found.digits < 0.35
    assert found.edge_px > 2
    assert found.as_dict().keys() == Probe.__dataclass_fields__.keys()


@pytest.mark.slow
def test_pretraining_writes_weights_and_record(tmp_path):
    record = pretrain_tower(
        "mini_dinov2", tmp_path, seed=3, steps=3, batch_size=8, images=40, held_out=20, probe_scenes=200
    )
    file = tmp_path / "mini_dinov2.safetensors"
    assert file.stat().st_size < 2_000_000
    assert {v.dtype for v in load_file(file).values()} == {torch.float16}
    assert json.loads((tmp_path / "mini_dinov2.json").read_text()) == record
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["settings"]["seed"] == 3 and record["loss"].keys() == {"1", "2", "3"}
    backbone = build_backbone("mini_dinov2", weights=str(file))
    assert probe(backbone, 3, 200, 50).as_dict() == record["probe"]


def test_every_shipped_tower_has_an_objective():
    weights = {name: load_choice("backbone", name).get("weights") for name in choices("backbone")}
    assert set(OBJECTIVES) == {name for name, source in weights.items() if source == f"asset:{name}"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_shipped_towers_are_what_their_records_say(name):
    file = ASSETS / f"{name}.safetensors"
    record = json.loads((ASSETS / f"{name}.json").read_text())
    assert file.stat().st_size < 2_000_000
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert record["name"] == name and len(record["versions"]) > 3
    assert build_backbone(name).grid == (8, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_shipped_towers_beat_random_weights(name):
    backbone = build_backbone(name)
    torch.manual_seed(0)
    found, random = (probe(b, 99, 400, 150) for b in (backbone, build_backbone(name, pretrained=False)))
    assert found.color > 0.85
    assert found.shape > random.shape + 0.05
    assert found.digits > random.digits + 0.05
    assert found.edge_px < random.edge_px
    assert np.isfinite(list(found.as_dict().values())).all()
