"""Means of scores in percent.

P is the mean over the pre-trained tasks, T the score of the target, and Avg the mean over all tasks with the target.
"""

from collections.abc import Mapping
from statistics import fmean, harmonic_mean


def average(scores: Mapping[str, float]) -> float:
    """Mean over tasks: Avg over all of them, or P over the pre-trained ones."""
    return fmean(scores.values())


def harmonic(one: float, other: float) -> float:
    """Harmonic mean of two scores, such as H(P, T); zero when either is zero."""
    return harmonic_mean([one, other])


def h_scores(P: float, T: float, Avg: float) -> dict[str, float]:
    """Harmonic means: "H" of P and T; the paper's two, "H LLaVA" of P and Avg (Table 1), "H MiniCPM" of Avg and T."""
    return {"H": harmonic(P, T), "H LLaVA": harmonic(P, Avg), "H MiniCPM": harmonic(Avg, T)}
