"""The claims that a sweep is to test, as its YAML states them.

    claims:
      - name: Average pooling beats the C-Abstractor
        paper: Table 1, ahead in nine of ten columns   # what the paper says, and where
        note: ...                                      # what a reader must know of this test
        contrasts:
          - first: {part: steps, projector: avgpool}   # the cells with these labels, one per seed,
            second: {part: steps, projector: c_abstractor}  # minus those
            measures: [mean, boxes, questions]         # the claim is judged by the first; the others are details
            expect: greater                            # than 0 | not_less: than 0 by more than `margin`
            margin: 0                                  # in the measures' unit
            equal: steps                               # or compute: what both arms were given the same of
            judges: true                               # false: a detail, where it could not come out either way or is
                                                       # not what the claim is about

Cells that were trained without their images are chosen by `recipe.blind: true` alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_deco.config.registry import unknown
from prism_deco.errors import UsageError

EQUAL = ("steps", "compute")

BENCHMARKS = ("mean", "boxes", "questions")
"""Measures in per cent: the mean of all benchmarks, of those that ask for boxes, of the others."""

RELEVANCE = ("energy_in_box", "pointing", "query_redundancy", "query_spread")
"""Measures in hundredths: means of R-GAE's relevance maps, by their names in the `metrics.json` of `explain`."""


@dataclass
class Contrast:
    """`first` minus `second`."""

    first: dict[str, str] = field(default_factory=dict)
    second: dict[str, str] = field(default_factory=dict)
    measures: list[str] = field(default_factory=lambda: ["mean"])
    expect: Literal["greater", "not_less"] = "greater"
    margin: float = 0.0
    equal: Literal["steps", "compute"] = "steps"
    judges: bool = True


@dataclass
class Claim:
    """A statement of the paper and the contrasts that test it."""

    name: str = ""
    contrasts: list[Contrast] = field(default_factory=list)
    paper: str = ""
    note: str = ""


def parse_claims(content: Sequence[Any]) -> list[Claim]:
    """The claims of a YAML's list.

    Raises:
        UsageError: one of them is not a claim; it is named, and what is wrong with it.
    """
    return [_claim(one, number) for number, one in enumerate(content, start=1)]


def _claim(content: Any, number: int) -> Claim:
    if not isinstance(content, Mapping) or not content.get("name"):
        raise UsageError(f"Claim {number} has no name.")
    where = f"The claim {content['name']!r}"
    try:
        claim: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Claim), dict(content)))
    except OmegaConfBaseException as error:
        raise UsageError(f"{where}: {' '.join(str(error).split())}") from error
    if not claim.contrasts:
        raise UsageError(f"{where} has no contrasts to test it by.")
    for contrast in claim.contrasts:
        if not contrast.first or not contrast.second:
            raise UsageError(f"{where}: a contrast does not say with labels what is first and what is second.")
        if (contrast.expect == "not_less") != (contrast.margin > 0):
            raise UsageError(f"{where}: expect: not_less and a margin above 0 go together.")
        for name in contrast.measures:
            if name not in (*BENCHMARKS, *RELEVANCE):
                raise unknown(f"measure of the claim {claim.name!r}", name, (*BENCHMARKS, *RELEVANCE))
    return claim
