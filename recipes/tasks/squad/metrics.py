"""SQuAD v1.1's exact match and F1, and answers out of the scores of their first and last tokens."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import numpy.typing as npt

_ARTICLE = re.compile(r"\b(a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)

Scores = npt.NDArray[np.floating[Any]]
Offsets = npt.NDArray[np.integer[Any]]


def normalize(text: str) -> str:
    """Lower case, without punctuation, then without articles, with single blanks."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, truth: str) -> float:
    """1 where both are the same after :func:`normalize`, else 0."""
    return float(normalize(prediction) == normalize(truth))


def f1(prediction: str, truth: str) -> float:
    """Harmonic mean of precision and recall of the words, with their multiplicity, after :func:`normalize`."""
    predicted, true = normalize(prediction).split(), normalize(truth).split()
    common = (Counter(predicted) & Counter(true)).total()
    return 2 * common / (len(predicted) + len(true)) if common else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {"f1": f1, "em": exact_match}


def score(predictions: Sequence[str], truths: Sequence[Sequence[str]]) -> dict[str, float]:
    """In percent: the mean over the questions, of each the best over its true answers."""
    return {
        name: 100
        * fmean(max(metric(text, true) for true in trues) for text, trues in zip(predictions, truths, strict=True))
        for name, metric in METRICS.items()
    }


def best_span(
    windows: Iterable[tuple[Scores, Scores, Offsets]], n_best: int, max_answer_length: int
) -> tuple[int, int]:
    """The most likely answer over all windows of a context.

    Args:
        windows: of each, the scores of a token to be the answer's first [T] and last [T], and the tokens' offsets in
            the context [T, 2], -1 where a token is none of the context's.
        n_best: how many of the best first tokens and of the best last tokens are combined.
        max_answer_length: in tokens.

    Returns:
        Where in the context it begins and ends; (0, 0) where there is none.
    """
    best, span = -np.inf, (0, 0)
    for start_scores, end_scores, offsets in windows:
        inside = offsets[:, 0] >= 0
        starts, ends = (_top(scores[: len(inside)], inside, n_best) for scores in (start_scores, end_scores))
        for first in starts:
            for last in ends:
                together = start_scores[first] + end_scores[last]
                if first <= last < first + max_answer_length and together > best:
                    best, span = together, (int(offsets[first, 0]), int(offsets[last, 1]))
    return span


def _top(scores: Scores, inside: npt.NDArray[np.bool_], count: int) -> list[int]:
    order = np.argsort(-np.where(inside, scores, -np.inf), kind="stable")[:count]
    return [int(index) for index in order if inside[index]]
