"""The summary columns of the tables: the mean over all tasks, and three harmonic means called Hscore.

P is the mean over the pre-trained tasks, T the score of the target, Avg the mean over every task, target included. The
Hscore of Table 1 is the harmonic mean of P and Avg and that of Table 2 the one of Avg and T: nothing else gives the
printed numbers. What the word suggests, H(P, T), is in neither.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from reproductions.shared.scores import harmonic

H_SCORES = ("H(P, Avg)", "H(Avg, T)", "H(P, T)")


@dataclass(frozen=True)
class Summary:
    """Scores of one system.

    Attributes:
        pretrained: of the pre-trained tasks, in percent; at least one.
        target: of the target, in percent.
    """

    pretrained: tuple[float, ...]
    target: float

    @property
    def retained(self) -> float:
        """P."""
        return fmean(self.pretrained)

    @property
    def average(self) -> float:
        """Avg."""
        return fmean((*self.pretrained, self.target))

    def h(self, name: str) -> float:
        """One of `H_SCORES`.

        Raises:
            ValueError: `name` is none of them.
        """
        if name not in H_SCORES:
            raise ValueError(f"name must be one of {'; '.join(H_SCORES)}, got {name!r}")
        values = {"P": self.retained, "Avg": self.average, "T": self.target}
        first, second = name.removeprefix("H(").removesuffix(")").split(", ")
        return harmonic(values[first], values[second])


def summary(scores: Sequence[float]) -> Summary:
    """From the scores in the order of the tables, the target last.

    Raises:
        ValueError: fewer than two scores.
    """
    if len(scores) < 2:
        raise ValueError(f"there must be a pre-trained task and a target, got {len(scores)} scores")
    return Summary(tuple(scores[:-1]), scores[-1])
