"""Exact match without case and punctuation."""

import string
from collections.abc import Sequence
from statistics import fmean

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.metric import EachMetric

_DROP = str.maketrans("", "", string.punctuation)


def plain(answer: str) -> str:
    """Lower case, without punctuation and surrounding blanks."""
    return answer.lower().translate(_DROP).strip()


class ExactMatch(EachMetric):
    name = "exact_match"

    def one(self, prediction: str, example: Example) -> float:
        return float(plain(prediction) in map(plain, example.answers))


class YesNoOrOpen(ExactMatch):
    """The same of a set that asks for yes or no in about half of its questions."""

    name = "yes_no_or_open"

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Also "yes_no" and "open": of the questions whose answer is yes or no, and of the others."""
        each = self.each(predictions, examples)
        out = {"score": fmean(each)}
        for key, wanted in (("yes_no", True), ("open", False)):
            some = [x for x, e in zip(each, examples, strict=True) if (plain(e.answers[0]) in ("yes", "no")) == wanted]
            out |= {key: fmean(some)} if some else {}
        return out
