"""Probes of a run's projector: what information the visual tokens keep, measured without the LLM.

Two probes (readers) are fitted to predict the labels of the object in a cell of the image, and which cells contain
objects: ridge regression, which also predicts the patches' features, and one layer of attention with an MLP. Both see
all tokens of an image, so a projector may keep information anywhere. Two references: probes fitted on the tokens of
other images (chance level), and probes of the patches, an upper bound for a projector.

Shapes: n images to fit on and m to test on, M visual tokens of width E, N patches of width D, T outputs.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from prism_deco.bootstrap import mean_interval
from prism_deco.data.images import open_image
from prism_deco.errors import UsageError
from prism_deco.explain.geometry import PatchFrame
from prism_deco.explain.objects import POSITION, RECONSTRUCTION, LabelledImage
from prism_deco.vlm import VLM

log = logging.getLogger(__name__)

_LEAST_SEEN = 10
"""Classes with fewer objects to fit on are ignored."""
_PENALTIES = tuple(10.0**power for power in range(-4, 4))
"""Candidate ridge penalties, as multiples of the mean eigenvalue."""
_CHOSEN_ON = 512
"""The penalty is chosen on about this many of the outputs, of which there may be half a million."""
_WIDTH, _EPOCHS, _BATCH = 64, 15, 32
"""Hyperparameters of the MLP probe."""
_IMAGES_AT_ONCE = 32


class Ridge:
    """Ridge regression with an intercept on standardised inputs, for many outputs at once.

    The penalty minimises the leave-one-out error, which has a closed form. Works on the n x n Gram matrix, as there are
    fewer images than inputs.

    Args:
        inputs: float32[n, F].
    """

    def __init__(self, inputs: Tensor):
        self._mean, self._std = inputs.mean(dim=0), inputs.std(dim=0).clamp(min=1e-6)
        self._inputs = (inputs - self._mean) / self._std
        # With K = V diag(values) V^T, a penalty only changes the eigenvalues: one decomposition serves all penalties
        # and all targets.
        values, self._vectors = torch.linalg.eigh((self._inputs @ self._inputs.T).double())
        self._values = values.clamp(min=0)

    def gram(self, inputs: Tensor) -> Tensor:
        """float32[m, F] -> float64[m, n]: inner products with the fitted images."""
        return (((inputs - self._mean) / self._std) @ self._inputs.T).double()

    def predict(self, gram: Tensor, targets: Tensor) -> Tensor:
        """float64[m, T] for the images of a `gram`, fitted to float32[n, T]."""
        offset = targets.double().mean(dim=0)
        centred = targets.double() - offset
        rotated = self._vectors.T @ centred
        # Every k-th output, so that about `_CHOSEN_ON` of them choose the penalty.
        some = slice(None, None, max(1, targets.shape[1] // _CHOSEN_ON))
        penalties = [penalty * self._values.mean().clamp(min=1e-9) for penalty in _PENALTIES]
        errors = [self._left_out_error(centred[:, some], rotated[:, some], penalty) for penalty in penalties]
        penalty = penalties[int(torch.stack(errors).argmin())]
        # The dual solution: gram @ (K + penalty I)^-1 @ targets, in the eigenbasis.
        return gram @ (self._vectors @ (rotated / (self._values + penalty)[:, None])) + offset

    def _left_out_error(self, centred: Tensor, rotated: Tensor, penalty: Tensor) -> Tensor:
        """float64[]: leave-one-out mean squared error."""
        kept = self._values / (self._values + penalty)
        # The diagonal of the hat matrix; 1/n is the intercept's share.
        leverage = 1 / len(centred) + self._vectors.square() @ kept
        residual = centred - self._vectors @ (kept[:, None] * rotated)
        # An image's error when left out is its residual in the fit to all, divided by 1 - leverage.
        return (residual / (1 - leverage).clamp(min=1e-6)[:, None]).square().mean()


@dataclass(frozen=True)
class _Encoded:
    """The probes' inputs, on the CPU.

    Attributes:
        tokens, patches: float32[n, M, E] and float32[n, N, D].
        objects: each object's image index, centre (x, y) in fractions of the tower's input, and labels.
    """

    tokens: Tensor
    patches: Tensor
    objects: list[tuple[int, float, float, dict[str, str]]]

    def targets(self, label: str, classes: Sequence[str], side: int) -> Tensor:
        """float32[n, side * side, classes]: 1 if an image has an object of the class in the cell."""
        made = torch.zeros(len(self.tokens), side * side, len(classes))
        for row, x, y, labels in self.objects:
            value = labels.get(label)
            if value in classes:
                # The row-major index of the cell that contains the object's centre.
                made[row, int(y * side) * side + int(x * side), classes.index(value)] = 1.0
        return made


@torch.no_grad()
def _encode(vlm: VLM, images: Sequence[LabelledImage], what: str) -> _Encoded:
    """Runs the towers and the projector, with a progress bar named `what`."""
    transform = vlm.backbone.transform
    tokens = torch.empty(len(images), vlm.projector.num_tokens, vlm.projector.out_dim)
    patches = torch.empty(len(images), vlm.backbone.num_patches, vlm.backbone.embed_dim)
    objects = []
    starts = range(0, len(images), _IMAGES_AT_ONCE)
    for start in track(starts, what, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        part = slice(start, start + _IMAGES_AT_ONCE)
        pixels = []
        for row, labelled in enumerate(images[part], start):
            image = open_image(labelled.path)
            pixels.append(transform(image))
            frame = PatchFrame(transform.frame(image.size), vlm.backbone.grid, vlm.backbone.patch_size)
            for box, labels in labelled.objects:
                (x1, y1, x2, y2), (height, width) = frame.to_grid(box), frame.grid
                x, y = (x1 + x2) / (2 * width), (y1 + y2) / (2 * height)
                if 0 <= x < 1 and 0 <= y < 1:  # not cropped away
                    # Every object also has the label `POSITION`, whose only class marks all occupied cells.
                    objects.append((row, x, y, labels | {POSITION: POSITION}))
        # A list of {tower: float32[3, S, S]} -> {tower: float32[images, 3, S, S]}.
        stacked = {tower: torch.stack([image[tower] for image in pixels]).to(vlm.device) for tower in pixels[0]}
        features = vlm.features(stacked)
        tokens[part] = vlm.project(features).float()
        patches[part] = features.float()
    for name, encoded in (("patches", patches), ("visual tokens", tokens)):
        if not encoded.isfinite().all():
            raise UsageError(f"The {name} are not all finite: has the run diverged? Probe another one.")
    return _Encoded(tokens, patches, objects)


@dataclass(frozen=True)
class _Task:
    """The targets of one label, or of `POSITION`: float32[n, cells, classes] and float32[m, cells, classes], 0 or 1."""

    label: str
    fit: Tensor
    test: Tensor

    def loss(self, scores: Tensor, rows: Tensor) -> Tensor:
        """float32[]: mean cross-entropy in nats of float32[rows, cells, classes], with the softmax over classes, or for
        positions over the cells of an image."""
        logs = scores.log_softmax(dim=1 if self.label == POSITION else 2)
        return -(logs * self.fit[rows]).sum() / self.fit[rows].sum().clamp(min=1)

    def measure(self, scores: Tensor) -> dict[str, Any]:
        """Accuracy of float[m, cells, classes] over the cells with objects; for positions, the fraction of an image's k
        cells with objects that are among its k highest scores."""
        if self.label == POSITION:
            # Sorting twice gives each cell's rank among those of its image, 0 for the highest score.
            ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
            hits = (ranks < self.test.sum(dim=1, keepdim=True))[self.test > 0]
        else:
            # 1 if the highest score is that of a class in the cell; only cells with objects are kept.
            hits = self.test.gather(2, scores.argmax(dim=2, keepdim=True))[self.test.sum(dim=2) > 0]
        return mean_interval(hits.double().flatten().tolist())


def _tasks(train: _Encoded, test: _Encoded, classes: Mapping[str, Sequence[str]], cells: int, fine: int) -> list[_Task]:
    sides = {label: fine if label == POSITION else cells for label in classes}
    return [
        _Task(label, train.targets(label, own, sides[label]), test.targets(label, own, sides[label]))
        for label, own in classes.items()
    ]


def _classes(train: _Encoded, test: _Encoded) -> dict[str, tuple[str, ...]]:
    """By label, the classes with enough objects to fit on, if the test images have any of them."""
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for *_, labels in train.objects:
        for label, value in labels.items():
            counts[label][value] += 1
    often = {}
    for label, found in counts.items():
        classes = tuple(sorted(value for value, count in found.items() if count >= _LEAST_SEEN))
        tested = any(labels.get(label) in classes for *_, labels in test.objects)
        if tested and (len(classes) > 1 or label == POSITION):
            often[label] = classes
    return often


def probe(
    vlm: VLM, fit: Sequence[LabelledImage], test: Sequence[LabelledImage], *, cells: int = 4, seed: int = 0
) -> dict[str, Any]:
    """Fits the probes on some images and measures them on others.

    Args:
        cells: cells per side of the image in which labels are predicted; positions use twice as many.
        seed: seed of the MLP and of the control's permutation.

    Returns:
        `classes`: the classes of each label. `readers`: by input ("patches", "tokens", "shuffled") and reader
        ("linear", "mlp"), the accuracy {mean, interval95, n} of each label over the cells with objects, that of
        "position" (`_Task.measure`), and "reconstruction_r2": the R^2 of the patches' features.
    """
    if min(len(fit), len(test)) < 2:
        raise UsageError(f"{len(fit)} images to fit probes on and {len(test)} to test them are too few.")
    train, held_out = _encode(vlm, fit, "Encoding images to fit on"), _encode(vlm, test, "Encoding images to test on")
    classes = _classes(train, held_out)
    # Ridge regression has separate weights for every cell; coarser cells give each more examples.
    coarse, fine = (_tasks(train, held_out, classes, side, 2 * cells) for side in (cells, 2 * cells))
    # Input i is fitted to the targets of image rows[i]: its own, or in the control those of a permutation.
    own, other = torch.arange(len(fit)), torch.randperm(len(fit), generator=torch.Generator().manual_seed(seed))
    patches, true = train.patches.flatten(1), held_out.patches.flatten(1)
    mean = patches.mean(dim=0)
    readers: dict[str, dict[str, dict[str, Any]]] = {}
    for inputs, fits in (("patches", {"patches": own}), ("tokens", {"tokens": own, "shuffled": other})):
        # Without classes only the reconstruction is left, which is not measured from the patches themselves.
        if not classes and inputs == "patches":
            continue
        seen, unseen = getattr(train, inputs), getattr(held_out, inputs)
        # Shuffling changes only the targets, so that one decomposition serves both fits.
        ridge = Ridge(seen.flatten(1))
        gram = ridge.gram(unseen.flatten(1))
        for name, rows in fits.items():
            log.info("Fitting the readers of the %s%s", inputs, " (shuffled)" if rows is other else "")
            linear = [ridge.predict(gram, task.fit[rows].flatten(1)).view_as(task.test) for task in coarse]
            mlp = _mlp(seen, unseen, fine, rows, 2 * cells, seed) if fine else []
            readers[name] = {
                "linear": {task.label: task.measure(scores) for task, scores in zip(coarse, linear, strict=True)},
                "mlp": {task.label: task.measure(scores) for task, scores in zip(fine, mlp, strict=True)},
            }
            if inputs == "tokens":
                error = (ridge.predict(gram, patches[rows]) - true).square().sum()
                readers[name]["linear"][RECONSTRUCTION] = float(1 - error / (true - mean).square().sum())
    return {"classes": {label: list(names) for label, names in classes.items()}, "readers": readers}


class _MLP(nn.Module):
    """Every cell attends to all tokens in one attention layer; an MLP predicts the classes."""

    def __init__(self, inputs: Tensor, side: int, classes: Sequence[int]):
        super().__init__()
        self.inward = nn.Linear(inputs.shape[2], _WIDTH)
        self.places = nn.Parameter(torch.randn(inputs.shape[1], _WIDTH))
        self.down, self.right = (nn.Parameter(torch.randn(side, _WIDTH)) for _ in range(2))
        self.look = nn.MultiheadAttention(_WIDTH, 4, batch_first=True)
        self.hidden = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.GELU(), nn.Linear(_WIDTH, sum(classes)))
        self.classes = list(classes)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """float32[n, M, E] -> per task float32[n, cells, classes]."""
        seen = self.inward(inputs) + self.places
        # A cell's query is the sum of its row's and its column's embedding: [n, side * side, width].
        cells = (self.down[:, None] + self.right).flatten(0, 1).expand(len(inputs), -1, -1)
        return self.hidden(self.look(cells, seen, seen, need_weights=False)[0]).split(self.classes, dim=2)


def _mlp(inputs: Tensor, test: Tensor, tasks: Sequence[_Task], order: Tensor, side: int, seed: int) -> list[Tensor]:
    """Trains on `inputs`, float32[n, M, E], with the targets of image `order[i]` for input i; returns the scores of
    `test`, float32[m, M, E], for every task."""
    mean, std = inputs.mean(dim=(0, 1)), inputs.std(dim=(0, 1)).clamp(min=1e-6)
    # The fit runs on the CPU, and leaves the caller's CPU random state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MLP(inputs, side, [task.fit.shape[2] for task in tasks])
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
        steps = _EPOCHS * -(-len(inputs) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        for _ in range(_EPOCHS):
            for rows in torch.randperm(len(inputs)).split(_BATCH):
                scores = model((inputs[rows] - mean) / std)
                losses = [task.loss(part, order[rows]) for task, part in zip(tasks, scores, strict=True)]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
    with torch.no_grad():
        parts = [model((rows - mean) / std) for rows in test.split(_BATCH)]
    # A tuple over tasks for each batch -> for each task, the scores of all batches.
    return [torch.cat(scores) for scores in zip(*parts, strict=True)]


def probe_table(result: Mapping[str, Any]) -> Table:
    """The content of `probe.json`, one row per input and reader."""
    columns = [*result["classes"], RECONSTRUCTION]
    made = Table(
        title=f"{result['run']} ({result['projector']}): read without the LLM from {result['images']['test']} images",
        caption="Accuracy in per cent and half of its 95 % interval. patches: what the projector gets; shuffled: the "
        "reader was fitted on the tokens of other images.",
        box=SIMPLE_HEAD,
    )
    for number, column in enumerate(("from", "reader", *columns)):
        made.add_column(column.replace("_", " "), justify="right" if number > 1 else "left")
    for name, readers in result["readers"].items():
        for reader, values in readers.items():
            if values:
                made.add_row(name, reader, *(_cell(values.get(column)) for column in columns))
    return made


def _cell(value: Mapping[str, Any] | float | None) -> str:
    if isinstance(value, Mapping):
        low, high = value["interval95"]
        return f"{100 * value['mean']:.1f} ±{50 * (high - low):.1f}"
    return "-" if value is None else f"{value:.3f}"
