"""What a result is judged by: the target score, what is kept, and the means of the paper's tables."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np

from reproductions.shared import scores as shared
from reproductions.shared.results import Result


def target_score(result: Result) -> float:
    """T in percent: exact matches of digits; of captions the share of right content words (`Evaluation.words`)."""
    return float(result["T_words"] if result["target"] == "caption" else result["T"])


def kept(result: Result) -> float:
    """P in percent, the mean over the pre-trained tasks: exact matches after digits, restricted ones after captions.

    After learning to caption every method answers old questions in sentences, so that exact matches tell what became
    of the form of answers; restricted to a task's answers, they tell what became of the knowledge.
    """
    return float(result["P_restricted"] if result["target"] == "caption" else result["P"])


def average(result: Result) -> float:
    """Avg: the mean over the seven pre-trained tasks and the target."""
    return (7 * kept(result) + target_score(result)) / 8


def h_scores(result: Result) -> dict[str, float]:
    """Harmonic means of P, T and Avg, as of `shared.scores`."""
    return shared.h_scores(kept(result), target_score(result), average(result))


def mean(results: Sequence[Result], score: Any) -> float:
    """Mean of a score over results; failed ones count as zero."""
    return fmean(0.0 if "failed" in result else score(result) for result in results)


def rate_that_reaches(rates: Sequence[float], scores: Sequence[float], wanted: float) -> float:
    """The lowest learning rate whose target score is `wanted`, read off the line between measured ones.

    Args:
        rates: in rising order.
        scores: target scores; made to rise with the rate by their running maximum, since a dip is noise.
        wanted: the score to be met.

    Returns:
        a rate between the first and the last; the last if none reaches it. Lines are straight in the rate's logarithm.
    """
    rising = np.maximum.accumulate(scores)
    if wanted <= rising[0]:
        return float(rates[0])
    if wanted > rising[-1]:
        return float(rates[-1])
    above = int(np.searchsorted(rising, wanted))
    share = (wanted - rising[above - 1]) / (rising[above] - rising[above - 1])
    logs = np.log(rates)
    return float(f"{np.exp(logs[above - 1] + share * (logs[above] - logs[above - 1])):.4g}")
