"""Benchmarks, scored as their authors score them."""

from prism_deco.config.choices import resolve_benchmarks as resolve
from prism_deco.evaluation.base import BENCHMARKS, Benchmark, Model
from prism_deco.evaluation.choose import build_benchmark
from prism_deco.evaluation.items import Item, Prediction, Question, Variant
from prism_deco.evaluation.predictions import load_predictions
from prism_deco.evaluation.runner import evaluate
from prism_deco.evaluation.scoring import chance, score_file
from prism_deco.evaluation.table import table

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Item",
    "Model",
    "Prediction",
    "Question",
    "Variant",
    "build_benchmark",
    "chance",
    "evaluate",
    "load_predictions",
    "resolve",
    "score_file",
    "table",
]
