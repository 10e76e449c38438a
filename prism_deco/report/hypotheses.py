"""The claims that a sweep is to test, as its YAML states them.

    claims:
      - name: Average pooling beats the C-Abstractor
        paper: Table 1, ahead in nine of ten columns   # what the paper says, and where
        note: ...                                      # what a reader must know of this test
        contrasts:
          - first: {part: steps, projector: avgpool}   # the cells of these labels, one per seed,
            second: {part: steps, projector: c_abstractor}  # minus those
            measures: [mean, boxes, questions]         # the claim is judged by the first; the others are details
            expect: greater                            # or not_less, by more than `margin`
            equal: steps                               # or compute: what both sides were given the same of
            judges: true                               # false: a detail, where it could not come out either way or is
                                                       # none of what the claim is about

Cells that were trained without their images are chosen by `recipe.blind: true` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError
from prism_deco.report.measures import MEASURES

EXPECT = ("greater", "not_less")
EQUAL = ("steps", "compute")


@dataclass(frozen=True)
class Contrast:
    """`first` minus `second`.

    Attributes:
        first, second: labels of the cells.
        measures: names of `MEASURES`.
        expect: what the claim says of the difference: greater (than 0) | not_less (than 0 by more than the margin).
        margin: in the measures' unit.
        equal: what both sides were given the same of: steps | compute.
        judges: whether the claim is judged by it.
    """

    first: Mapping[str, str]
    second: Mapping[str, str]
    measures: tuple[str, ...] = ("mean",)
    expect: str = "greater"
    margin: float = 0.0
    equal: str = "steps"
    judges: bool = True

    @property
    def null(self) -> float:
        """The difference above which the claim holds and below which it is reversed."""
        return -self.margin


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and the contrasts that test it.

    Attributes:
        paper: what the paper says, and where.
        note: what a reader must know of this test.
    """

    name: str
    contrasts: tuple[Contrast, ...]
    paper: str = ""
    note: str = ""


def read_sweep(folder: Path) -> Mapping[str, Any]:
    """What a sweep was asked for; empty where the folder does not say."""
    path = folder / "sweep.yaml"
    if not path.is_file():
        return {}
    content = OmegaConf.to_container(OmegaConf.load(path))
    return content if isinstance(content, dict) else {}  # type: ignore[return-value]


def parse(content: Sequence[Any]) -> list[Claim]:
    """The claims of a YAML's list.

    Raises:
        UsageError: the list is not one of claims; the claim is named, and what is wrong with it.
    """
    return [_claim(one, number) for number, one in enumerate(content, start=1)]


def _claim(content: Any, number: int) -> Claim:
    name = str(content.get("name") or "") if isinstance(content, Mapping) else ""
    if not name:
        raise UsageError(f"Claim {number} has no name.")
    _check_keys(f"key (claim {name})", content, Claim)
    contrasts = content.get("contrasts") or []
    if not contrasts:
        raise UsageError(f"The claim {name!r} has no contrasts to test it by.")
    made = tuple(_contrast(one, f"(claim {name})") for one in contrasts)
    return Claim(name, made, *(" ".join(str(content.get(key) or "").split()) for key in ("paper", "note")))


def _contrast(content: Any, of: str) -> Contrast:
    sides: list[Any] = [content.get(key) for key in ("first", "second")] if isinstance(content, Mapping) else [None]
    if not all(isinstance(side, Mapping) and side for side in sides):
        raise UsageError(f"A contrast {of} does not say with labels what is first and what is second.")
    _check_keys(f"key of a contrast {of}", content, Contrast)
    first, second = ({str(key): str(value) for key, value in side.items()} for side in sides)
    measures = tuple(content.get("measures") or ("mean",))
    more = {key: content[key] for key in ("expect", "margin", "equal", "judges") if key in content}
    made = Contrast(first, second, measures, **more)
    for kind, value, known in (
        *(("measure", measure, MEASURES) for measure in measures),
        ("expect", made.expect, EXPECT),
        ("equal", made.equal, EQUAL),
    ):
        if value not in known:
            raise unknown(f"{kind} of a contrast {of}", str(value), known)
    if (made.expect == "not_less") != (made.margin > 0):
        raise UsageError(f"A contrast {of}: expect: not_less and a margin above 0 go together.")
    if not isinstance(made.judges, bool):
        raise UsageError(f"A contrast {of}: judges is true or false, not {made.judges!r}.")
    return made


def _check_keys(kind: str, content: Mapping[str, Any], of: type) -> None:
    known = [field.name for field in fields(of)]
    for key in content:
        if key not in known:
            raise unknown(kind, str(key), known)
