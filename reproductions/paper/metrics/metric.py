"""What every metric has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar

from reproductions.paper.data.examples import Example


class Metric(ABC):
    """Scores the answers to the examples of one data set, in percent.

    Attributes:
        name: what data sets call it.
    """

    name: ClassVar[str]

    @abstractmethod
    def each(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        """Score of every answer by itself, in percent.

        Raises:
            ValueError: nothing to score, or not one prediction an example.
        """

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Scores of all answers together, in percent; "score", the number of the tables, comes first.

        Raises:
            ValueError: as `each`.
        """
        return {"score": fmean(self.each(predictions, examples))}


class EachMetric(Metric):
    """A metric whose score is the mean over answers that are scored one by one."""

    @abstractmethod
    def one(self, prediction: str, example: Example) -> float:
        """Share of one answer that is right, from 0 to 1."""

    def each(self, predictions: Sequence[str], examples: Sequence[Example]) -> list[float]:
        require_pairs(predictions, examples)
        return [100 * self.one(prediction, example) for prediction, example in zip(predictions, examples, strict=True)]


def require_pairs(predictions: Sequence[str], examples: Sequence[Example]) -> None:
    """Raise ValueError unless there is one prediction for each of at least one example."""
    if not predictions or len(predictions) != len(examples):
        raise ValueError(
            f"there must be one prediction an example, got {len(predictions)} for {len(examples)} examples"
        )
