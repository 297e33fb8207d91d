"""How far answers to the new task's prompts have moved, and what was forgotten, over systems."""

import math
from collections.abc import Mapping
from statistics import fmean

from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.shared.stats import spearman

FEWEST_SYSTEMS = 4
"""For Spearman's ρ and its interval."""

Diverged = Mapping[str, tuple[Mapping[int, float], float]]


def diverged(cell: CellOutcomes) -> Diverged:
    """By system whose runs hold it: KL by seed, and the mean change of P from the pre-trained model on these seeds.

    Systems that share their runs count once.
    """
    before = cell.systems["zero-shot"].values("P") if "zero-shot" in cell.systems else {}
    found = {}
    for name in cell.distinct:
        kl, P = (cell.systems[name].values(measure) for measure in ("KL", "P"))
        both = sorted(kl.keys() & before.keys())
        if name != "zero-shot" and both:
            found[name] = {seed: kl[seed] for seed in both}, fmean(P[seed] - before[seed] for seed in both)
    return found


def correlation(found: Diverged) -> str:
    """Spearman's ρ over systems of mean KL and mean ΔP, in words."""
    if len(found) < FEWEST_SYSTEMS:
        return f"Of {len(found)} systems there is no correlation to speak of."
    rho = spearman(points(found))
    if math.isnan(rho.rho):
        return f"Nothing varies over {len(found)} systems."
    return f"Spearman's ρ over {len(found)} systems: {rho}."


def points(found: Diverged) -> list[tuple[float, float]]:
    """Mean KL and mean ΔP of each system."""
    return [(fmean(kl.values()), lost) for kl, lost in found.values()]
