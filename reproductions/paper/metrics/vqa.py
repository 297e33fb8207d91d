"""VQA accuracy (Antol et al. 2015, arXiv 1505.00468) with the normalisation of the EvalAI server.

An answer counts min(1, annotators who gave it / 3), averaged over leaving out one annotator at a time. The rules of the
normalisation, oddities included, are those of the evaluation that VQA v2, OK-VQA and TextVQA share; lmms-eval uses them
for VizWiz too.
"""

import re
from collections.abc import Sequence
from statistics import fmean

from reproductions.paper.data.examples import Example
from reproductions.paper.metrics.contractions import CONTRACTIONS
from reproductions.paper.metrics.metric import EachMetric

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_WORDS = {word: str(i) for i, word in enumerate(_NUMBERS)} | {"none": "0"}
_ARTICLES = {"a", "an", "the"}


def normalise(answer: str) -> str:
    """Lower case, without punctuation and articles, numbers up to ten as digits, apostrophes put back."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = _without_punctuation(text.replace("\n", " ").replace("\t", " ").strip())
    words = [_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    out, number = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        # A mark that touches a blank anywhere vanishes; one inside a word becomes a blank.
        loose = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if loose or number else " ")
    return _PERIOD.sub("", out)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Share, from 0 to 1.

    Raises:
        ValueError: fewer than two answers: there is nobody to agree with.
    """
    if len(answers) < 2:
        raise ValueError(f"VQA accuracy needs at least 2 reference answers, got {list(answers)}")
    given, normal = normalise(prediction), [normalise(answer) for answer in answers]
    same = normal.count(given)
    return sum(min(1.0, (same - (answer == given)) / 3) for answer in normal) / len(normal)


class VQA(EachMetric):
    name = "vqa"

    def one(self, prediction: str, example: Example) -> float:
        return vqa_accuracy(prediction, example.answers)

    def score(self, predictions: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
        """Also "any_annotator": the share of answers that at least one annotator gave."""
        scores = super().score(predictions, examples)
        anyone = [
            normalise(prediction) in map(normalise, example.answers)
            for prediction, example in zip(predictions, examples, strict=True)
        ]
        return {**scores, "any_annotator": 100 * fmean(anyone)}
