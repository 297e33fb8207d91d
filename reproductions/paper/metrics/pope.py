"""POPE: is the answer "yes" or "no"; anything else is neither."""

from collections.abc import Sequence
from statistics import fmean

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.metric import EachMetric


class POPEMetric(EachMetric):
    """F1 of "yes", which the tables print; `each` is whether the answer is right."""

    name = "pope"

    def one(self, prediction: str, example: Example) -> float:
        return float(prediction.lower().strip() == example.answers[0])

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """F1 as "score", then "accuracy", "precision", "recall"; 0 where they are 0 / 0."""
        each = self.each(predictions, examples)
        said = [prediction.lower().strip() == "yes" for prediction in predictions]
        true = [example.answers[0] == "yes" for example in examples]
        both = sum(s and t for s, t in zip(said, true, strict=True))
        precision, recall = (both / sum(all_yes) if any(all_yes) else 0.0 for all_yes in (said, true))
        f1 = 2 * precision * recall / (precision + recall) if both else 0.0
        return {"score": 100 * f1, "accuracy": fmean(each), "precision": 100 * precision, "recall": 100 * recall}
