"""The scores printed in Tables 1 to 3 of the DeCo paper (arXiv 2405.20985), and how its authors trained."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from prism_deco.report.cells import RunCell

FOLDER = Path(__file__).parent.parent / "assets" / "paper"

COLUMNS = {
    1: ("seed", "mme", "pope", "refcoco", "refcocoplus", "refcocog", "vizwiz", "vqav2", "gqa", "textvqa"),
    3: ("pope", "refcoco", "refcocoplus", "refcocog", "vizwiz", "vqav2", "gqa", "textvqa"),
}
"""Benchmarks of each table, in the order of its columns."""

GAIN_GROUPS = {
    "multimodal benchmarks": ("seed", "mme", "pope"),
    "visual localization": ("refcoco", "refcocoplus", "refcocog"),
    "open-ended VQA": ("vizwiz", "vqav2", "gqa", "textvqa"),
}
"""The groups of Table 1's columns over which the abstract states DeCo's mean relative gains over C-Abstractor."""

SPATIAL = (
    ("mme", "score/position", 200.0),
    ("mmbench", "accuracy/object_localization", 100.0),
    ("mmbench", "accuracy/physical_relation", 100.0),
    ("mmbench", "accuracy/spatial_relationship", 100.0),
    ("seed", "accuracy/Spatial Relation", 100.0),
    ("seed", "accuracy/Instance Location", 100.0),
)
"""The tasks of Table 2: benchmark, metric, maximum. Its average is over percentages of the maximum, as in Honeybee."""

RECIPES = {1: ("llava_v1_5_finetune",), 3: ("deco", "prism")}
"""Recipes that a cell of a table may have: the authors' own, or the one it is derived from."""


@dataclass(frozen=True)
class Authors:
    """How the authors trained the models of a table, as far as is known.

    Attributes:
        overrides: the command line that reproduces it, without tower, projector and LLM.
        devices: number of devices that shared a global batch.
        packages: library versions.
        seed: whether the authors' seed is known; it is then this project's default.
    """

    overrides: tuple[str, ...]
    devices: int
    packages: Mapping[str, str]
    seed: bool

    @property
    def recipe(self) -> str:
        return self.overrides[0].removeprefix("recipe=")


_DATA = ("data=llava_v1_5_mix665k", "trainer=fsdp")
AUTHORS = {
    # LLaVA-1.5's scripts.
    1: Authors(("recipe=llava_v1_5_finetune", *_DATA, "llm.dtype=bfloat16"), 8, {"transformers": "4.37.2"}, seed=False),
    # The launch scripts and the requirements of github.com/yaolinli/prismatic-vlms.
    3: Authors(
        ("recipe=deco", *_DATA, "trainer.reduce_dtype=bfloat16"),
        2,
        {"torch": "2.1.0", "transformers": "4.39.1", "open_clip_torch": "2.23.0", "timm": "0.9.10"},
        seed=True,
    ),
}

_BENCHMARKS = {"seed_image": "seed", "mme_perception": "mme"}
_TOWERS = {
    "CLIP ViT-L": "clip_vit_l",
    "CLIP ViT-L/14-336": "clip_vit_l",
    "SigLIP ViT-SO400M": "siglip_so400m",
    "DINOv2+SigLIP": "dinov2_siglip",
}
_LLMS = {"Phi-2-2.7B": "phi2", "Qwen-Chat-0.5B": "qwen1_5_0_5b_chat", "Vicuna-v1.5-7B": "vicuna_7b_v1_5"}
_PROJECTORS = {
    "C-Abstractor": "c_abstractor",
    "AdaptiveAvgPool": "avgpool",
    "linear_cited": "linear",
    "linear_star": "linear",
    "deco_avgpool": "avgpool",
}


@dataclass(frozen=True)
class PaperRow:
    """A line of Table 1 or 3.

    Attributes:
        setting: `B1` .. `B6` in Table 3; `T1` in Table 1, which has only one setting.
        resolution: in pixels.
        tokens: visual tokens per image.
        scores: by benchmark.
        cited: whether the paper quotes the line from LLaVA-1.5 instead of training the model itself.
    """

    setting: str
    projector: str
    backbone: str
    llm: str
    resolution: int
    tokens: int
    scores: Mapping[str, float]
    cited: bool = False


@cache
def rows(table: int) -> list[PaperRow]:
    """The lines of Table 1 or 3."""
    with (FOLDER / f"table{table}.csv").open(encoding="utf-8", newline="") as file:
        return [_row(record) for record in csv.DictReader(file)]


@cache
def spatial_averages() -> dict[str, float]:
    """The averages of Table 2 by projector; its other cells are unknown."""
    with (FOLDER / "table2.csv").open(encoding="utf-8", newline="") as file:
        records = csv.DictReader(file)
        return {_PROJECTORS.get(r["projector"], r["projector"]): float(r["spatial_average"]) for r in records}


def scores(table: int) -> dict[tuple[str, str], Mapping[str, float]]:
    """Scores by setting and projector, without the cited line."""
    return {(row.setting, row.projector): row.scores for row in rows(table) if not row.cited}


def setting(cell: RunCell, table: int) -> str | None:
    """The setting of a table that a cell belongs to, whatever its projector; None if it belongs to none.

    Tower, LLM, resolution, number of visual tokens and recipe must be the table's. Other differences from the authors'
    settings are listed next to the table (see `recipe_diff`).
    """
    config = cell.config
    if config is None or config.recipe.name not in RECIPES[table]:
        return None
    # The number of tokens must be the one printed for this projector, or for any if the table lacks the projector. An
    # uncompressed projector that the table lacks is a reference, whatever its number of tokens.
    same = [row for row in rows(table) if row.projector == cell.projector]
    tokens = cell.tokens if cell.manifest else config.projector.num_tokens
    free = tokens is None or (not same and not cell.compressed)
    names = (config.backbone.name, config.llm.name)
    for row in same or rows(table):
        # None is the tower's own size, and the names of towers contain it.
        own_size = config.backbone.image_size in (None, row.resolution)
        if names == (row.backbone, row.llm) and own_size and (free or tokens == row.tokens):
            return row.setting
    return None


def _row(record: Mapping[str, str]) -> PaperRow:
    # Only Table 1 has a column `row`, with a short name of each line; only Table 3 has a column `setting`.
    name = record.get("row", "")
    resolution = int(record["resolution"])
    known = set(COLUMNS[1])
    values = {_BENCHMARKS.get(name, name): value for name, value in record.items()}
    projector = name or record["projector"]
    return PaperRow(
        setting=record.get("setting", "T1"),
        projector=_PROJECTORS.get(projector, projector),
        backbone=f"{_TOWERS[record['vision']]}_{resolution}",
        llm=_LLMS[record["llm"]],
        resolution=resolution,
        tokens=int(record["tokens_out"]),
        scores={name: float(value) for name, value in values.items() if name in known},
        cited=name == "linear_cited",
    )


def gains(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float | None]:
    """Mean relative gain of `first` over `second` in per cent, by group of Table 1's columns; None if one is missing.

    Args:
        first, second: scores by benchmark.
    """
    found: dict[str, float | None] = {}
    for name, columns in GAIN_GROUPS.items():
        complete = all(column in first and column in second for column in columns)
        found[name] = fmean(100 * (first[c] - second[c]) / second[c] for c in columns) if complete else None
    return found
