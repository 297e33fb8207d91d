"""Multiple choice: the letter of an option."""

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.exact import ExactMatch
from reproductions.paper.metrics.metric import EachMetric

_LETTERS = "ABCDE"
_FORMS = [("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."), (":", ""),
          (":", ","), (":", "."), (":", ")"), (":", ").")]  # fmt: skip


class Letter(EachMetric):
    """The letter alone in either case, or an answer that begins with the capital letter and a period."""

    name = "letter"

    def one(self, prediction: str, example: Example) -> float:
        given = prediction.strip()
        if given[:1].isupper() and given[1:2] == ".":
            given = given[0]
        return float(given.lower() == example.answers[0].lower())


class IconQAMetric(EachMetric):
    """The letter where there are options, else exact match."""

    name = "iconqa"

    def one(self, prediction: str, example: Example) -> float:
        return (Letter() if example.choices else ExactMatch()).one(prediction, example)


def infer_option(prediction: str, choices: Sequence[str]) -> str | None:
    """The option that an answer names, by the rules of MMBench's evaluation before it asks a language model.

    The first of these that singles out one option: its letter as a word, bare (unless it may be the article "A") or
    with punctuation around it; or its text inside the answer.
    """
    words = prediction.split()
    for before, after in _FORMS:
        named = [letter for letter in _LETTERS if before + letter + after in words]
        article = not before + after and "A" in words and len(words) > 3
        if len(named) == 1 and not article:
            return named[0]
    said = prediction.lower()
    inside = [letter for letter, text in zip(_LETTERS, choices, strict=False) if text.lower() in said]
    return inside[0] if len(inside) == 1 else None


class MMBenchMetric(EachMetric):
    """Circular evaluation: a question counts where it is answered rightly in each of its rotations."""

    name = "mmbench"

    def one(self, prediction: str, example: Example) -> float:
        return float(infer_option(prediction, example.choices) == example.answers[0])

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Also "accuracy", over all rotations by themselves. Where a limit cut rotations off, the rest decides."""
        each, groups = self.each(predictions, examples), defaultdict(list)
        for right, example in zip(each, examples, strict=True):
            groups[example.extra["group"]].append(right)
        return {"score": fmean(map(min, groups.values())), "accuracy": fmean(each)}
