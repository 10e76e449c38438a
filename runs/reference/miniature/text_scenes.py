"""Scenes of the miniature world in words: the text on which its language models are pretrained.

A scene is either written out or folded. Folding adds up the embeddings of the words that describe a grid cell, so each
cell becomes one vector. A language model pretrained on folded cells can read vectors that stand for several words at
once, as visual tokens do. Both forms come from the scene's description, without rendering and without a tower.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from prism_deco.miniature.conversations import caption
from prism_deco.miniature.expressions import box_text
from prism_deco.miniature.rng import Dice
from prism_deco.miniature.scene import IMAGE_SIZE, Box, Scene

GRID = 4
CELLS = GRID * GRID
_CELL = IMAGE_SIZE // GRID

_PLATE_PLACE = 7
"""The words of a plate come after the seven of a shape: size, colour, shape and four edges."""
_PLACES = 10
_SHIFT = 13
"""Components by which a word's vector is rotated per position, so that the sum preserves the order of the words."""


class Writer:
    """Writes scenes with the tokens of one language model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._known: dict[str, int] = {}

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text, without special tokens."""
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def word(self, word: str) -> int:
        """The last token of a word as it occurs in a sentence: with a space in front, except for numbers."""
        if word not in self._known:
            self._known[word] = self.tokens(word if word[0].isdigit() else f"a {word}")[-1]
        return self._known[word]

    def write(self, scene: Scene, dice: Dice) -> list[int]:
        """The scene as token ids: a caption, a list of the objects, or a grid with a mark for every cell."""
        if dice.chance(25):
            return self.tokens(f" There is {caption(scene)}.")
        parts = phrases(scene)
        if dice.chance(30):  # no edges
            parts = [(box, words[:3]) for box, words in parts]
        comma, dot = self.tokens("a,")[-1], self.tokens("a.")[-1]
        if dice.chance(20):
            dice.shuffle(parts)
            return [token for _, words in parts for token in [*map(self.word, words), comma]]
        written: list[int] = []
        for cell in range(CELLS):
            here = [words for box, words in parts if _middle_cell(box) == cell]
            written += [self.word(word) for words in here for word in words]
            written.append(comma if here else dot)
        return written

    def fold(self, scenes: Sequence[Scene], table: Tensor) -> Tensor:
        """The scenes with one vector per cell: float[len(scenes), CELLS, E].

        Args:
            table: float[V, E], the embeddings of the words.
        """
        cells = [self._cell(scene, cell) for scene in scenes for cell in range(CELLS)]
        longest = max(1, *(len(words) for words in cells))
        ids = torch.zeros(len(cells), longest, dtype=torch.long)
        places = torch.zeros_like(ids)
        used = torch.zeros(len(cells), longest)
        for row, words in enumerate(cells):
            for column, (place, token) in enumerate(words):
                ids[row, column], places[row, column], used[row, column] = token, place, 1.0
        width = table.shape[1]
        rotated = torch.stack([torch.arange(width).roll(-_SHIFT * place) for place in range(_PLACES)])
        words = table[ids].gather(-1, rotated[places])
        return (words * used[..., None]).sum(1).view(len(scenes), CELLS, width)

    def _cell(self, scene: Scene, cell: int) -> list[tuple[int, int]]:
        """Position and token of each word of the object that covers most of a cell; empty below a fifth of the cell."""
        covered = [(_overlap(box, cell), words) for box, words in phrases(scene)]
        most, words = max(covered, key=lambda part: part[0])
        if most < _CELL * _CELL / 5:
            return []
        first = _PLATE_PLACE if words[0] == "plate" else 0
        return [(first + place, self.word(word)) for place, word in enumerate(words)]


def phrases(scene: Scene) -> list[tuple[Box, list[str]]]:
    """Each object with its box and words: "small", "red", "circle" and the edges, or "plate" and its digits."""
    parts = [
        (thing.box, [thing.size_word, thing.color, thing.shape, *box_text(thing.box)[1:-1].split(", ")])
        for thing in scene.things
    ]
    if scene.plate is not None:
        parts.append((scene.plate.box, ["plate", *str(scene.plate.number)]))
    return parts


def _middle_cell(box: Box) -> int:
    x1, y1, x2, y2 = box
    return (y1 + y2) // (2 * _CELL) * GRID + (x1 + x2) // (2 * _CELL)


def _overlap(box: Box, cell: int) -> int:
    """Pixels of a cell that a box covers."""
    top, left = cell // GRID * _CELL, cell % GRID * _CELL
    width = min(box[2], left + _CELL) - max(box[0], left)
    height = min(box[3], top + _CELL) - max(box[1], top)
    return max(0, width) * max(0, height)
