"""Exact match without case and punctuation."""

import string

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
