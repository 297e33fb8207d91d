"""POPE: is the answer "yes" or "no"; anything else is neither, and wrong.

Published numbers of LLaVA are another quantity: the mean of three categories' F1, by a script that takes an answer for
"no" if its first sentence has one of the words "no" and "not", and for "yes" otherwise. It stands beside ours.
"""

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
        """F1 over all questions as "score", "accuracy", "precision", "recall" (0 where they are 0 / 0), "answered":
        with yes or no.

        Where examples have a category, "f1_<category>" and their mean "f1_categories" too, and "f1_llava", which is
        that mean by the rule of LLaVA's script.
        """
        each, said = self.each(predictions, examples), [_said(prediction) for prediction in predictions]
        true = [example.answers[0] for example in examples]
        f1, precision, recall = _f1(said, true)
        out = {
            "score": f1,
            "accuracy": fmean(each),
            "precision": precision,
            "recall": recall,
            "answered": 100 * fmean(answer in ("yes", "no") for answer in said),
        }
        places: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            places.setdefault(str(example.extra.get("category", "")), []).append(i)
        if "" in places:
            return out
        strict = {name: _f1([said[i] for i in some], [true[i] for i in some])[0] for name, some in places.items()}
        loose = [_f1([_by_llava(predictions[i]) for i in some], [true[i] for i in some])[0] for some in places.values()]
        out |= {f"f1_{name}": value for name, value in strict.items()}
        return out | {"f1_categories": fmean(strict.values()), "f1_llava": fmean(loose)}


def _f1(said: Sequence[str], true: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall of "yes", in percent."""
    both = sum(s == t == "yes" for s, t in zip(said, true, strict=True))
    precision, recall = (100 * both / answers.count("yes") if "yes" in answers else 0.0 for answers in (said, true))
    return (2 * precision * recall / (precision + recall) if both else 0.0), precision, recall


def _said(prediction: str) -> str:
    return prediction.lower().strip().removesuffix(".").rstrip()


def _by_llava(prediction: str) -> str:
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"
