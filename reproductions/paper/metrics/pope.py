"""POPE: is the answer "yes" or "no"; anything else is neither, and wrong."""

from collections.abc import Sequence
from statistics import fmean

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.metric import EachMetric


class POPEMetric(EachMetric):
    """F1 of "yes", which the tables print; `each` is whether the answer is right.

    Where a "yes" is due, an answer that is neither counts as a miss. lmms-eval leaves such answers out of the recall,
    which can give a model that describes pictures instead of answering an F1 of 100; the two agree where every answer
    is "yes" or "no".
    """

    name = "pope"

    def one(self, prediction: str, example: Example) -> float:
        return float(_said(prediction) == example.answers[0])

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """F1 as "score", "accuracy", "precision", "recall" (0 where they are 0 / 0), "answered": with yes or no."""
        each, said = self.each(predictions, examples), [_said(prediction) for prediction in predictions]
        true = [example.answers[0] for example in examples]
        both = sum(s == t == "yes" for s, t in zip(said, true, strict=True))
        precision, recall = (100 * both / answers.count("yes") if "yes" in answers else 0.0 for answers in (said, true))
        return {
            "score": 2 * precision * recall / (precision + recall) if both else 0.0,
            "accuracy": fmean(each),
            "precision": precision,
            "recall": recall,
            "answered": 100 * fmean(answer in ("yes", "no") for answer in said),
        }


def _said(prediction: str) -> str:
    return prediction.lower().strip()
