"""VQA accuracy: agreement with ten annotators, averaged over leaving each of them out.

The conventions differ in what they rewrite before comparing; all take the raw prediction and the raw
answers of the annotators and return a score in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_deco.evaluation.metrics.vqa_text import (
    flatten,
    process,
    process_evalai,
    process_prism_vizwiz,
    process_vizwiz,
    strip_punctuation,
)

VQAScore = Callable[[str, Sequence[str]], float]


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over annotators of min(1, matches among the others / 3), strings compared as they are.

    Among ten annotators 1, 2, 3, 4 matches give .3, .6, .9, 1.
    """
    matches = sum(answer == prediction for answer in answers)
    left_out = (matches - (answer == prediction) for answer in answers)
    return sum(min(1.0, others / 3) for others in left_out) / len(answers)


def official(prediction: str, answers: Sequence[str]) -> float:
    """The VQA challenge's script: nothing is processed where all annotators wrote the same."""
    prediction, answers = flatten(prediction), [flatten(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = process(prediction), [process(answer) for answer in answers]
    return agreement(prediction, answers)


def evalai(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's evaluator (MMF's `TextVQAAccuracyEvaluator`): both sides always processed, as on the EvalAI server."""
    return agreement(process_evalai(prediction), [process_evalai(answer) for answer in answers])


def llava(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's result on VQAv2's test server (its `scripts/convert_vqav2_for_submission.py`): EvalAI's processor
    rewrites the prediction, and only that, before it is submitted; the server then runs the official script on it.

    So where all annotators wrote the same, an answer that the processor changes is lost: "Coca Cola" scores 0
    against ten times "Coca Cola".
    """
    return official(process_evalai(prediction), answers)


def prism_vqav2(prediction: str, answers: Sequence[str]) -> float:
    """The PRISM harness on VQAv2: answers only lose their punctuation, always (no case, digits, articles)."""
    return agreement(process(prediction), [strip_punctuation(answer) for answer in answers])


def vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz's own script: the prediction is always processed, the annotators' answers never."""
    return agreement(process_vizwiz(prediction), answers)


def vizwiz_llava(prediction: str, answers: Sequence[str]) -> float:
    """LLaVA's result on VizWiz's test server (its `scripts/convert_vizwiz_for_submission.py`): EvalAI's processor
    rewrites the prediction before it is submitted; VizWiz's script then processes it again."""
    return vizwiz(process_evalai(prediction), answers)


def prism_vizwiz(prediction: str, answers: Sequence[str]) -> float:
    """The PRISM harness on VizWiz: VizWiz's script but for the apostrophes of its contraction table."""
    return agreement(process_prism_vizwiz(prediction), answers)
