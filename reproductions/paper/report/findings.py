"""What the paper found, held against the runs on disk."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from reproductions.paper.report.analysis import masking, ranks
from reproductions.paper.report.published import PublishedExperiment, published
from reproductions.paper.report.results import Result
from reproductions.paper.report.scores import summary

Runs = Mapping[str, Mapping[str, Result]]


@dataclass(frozen=True)
class Finding:
    """A statement of the paper.

    Attributes:
        statement: in a sentence.
        evidence: what the runs say, a line an experiment; empty where nothing is measured yet.
        holds: whether all of them agree; None without evidence.
    """

    statement: str
    evidence: tuple[str, ...]
    holds: bool | None


def findings(runs: Runs) -> list[Finding]:
    """The paper's findings in its order. Smoke runs are no evidence, nor are scores of a run with tasks missing."""
    real = {name: {m: run for m, run in methods.items() if not run.smoke} for name, methods in runs.items()}
    llava = [name for name, experiment in published().items() if experiment.model.startswith("LLaVA")]
    return [
        _judge("Fine-tuning lowers the effective rank of visual features on every pre-trained task.",
               _higher(real, "zero-shot", "fine-tune", list(published()))),
        _judge("MDGD keeps the effective rank above that of fine-tuning.",
               _higher(real, "mdgd", "fine-tune", list(published()))),
        _judge("On LLaVA, MDGD's effective rank is at or above the pre-trained one.",
               _higher(real, "mdgd", "zero-shot", llava)),
        _judge("MDGD or MDGD-GM has the best Avg.", _best(real)),
        _judge("On LLaVA and Flickr30k, Avg and Hscore order MDGD and MDGD-GM > Model Tailor > Fine-tune > LoRA.",
               _order(real.get("llava-flickr30k", {}))),
        _judge("At half of the numbers, MDGD-GM's two decoupled gradients still have a cosine above 0.7.",
               _aligned(real)),
    ]  # fmt: skip


def _judge(statement: str, found: Iterator[tuple[bool, str]]) -> Finding:
    evidence = list(found)
    return Finding(statement, tuple(text for _, text in evidence), all(ok for ok, _ in evidence) if evidence else None)


def _higher(runs: Runs, high: str, low: str, names: Sequence[str]) -> Iterator[tuple[bool, str]]:
    for name in names:
        found = ranks(runs.get(name, {}), (high, low), published()[name].pretrained)
        if len(found) == 2:
            apart = np.subtract(found[high], found[low])
            apart = apart[~np.isnan(apart)]
            if len(apart):
                text = f"{name}: on {(apart >= 0).sum()} of {len(apart)} tasks, by {apart.mean():+.1f} on average"
                yield bool((apart >= 0).all()), text


def _best(runs: Runs) -> Iterator[tuple[bool, str]]:
    for name, experiment in published().items():
        averages = _summaries(experiment, runs.get(name, {}))
        # The best of a few systems says little; the paper's comparison needs a baseline at the least.
        if {"mdgd", "mdgd-gm"} & averages.keys() and {"zero-shot", "fine-tune"} <= averages.keys():
            ordered = sorted(averages, key=lambda method: -averages[method][0])
            text = ", ".join(f"{method} {averages[method][0]:.2f}" for method in ordered[:3])
            yield ordered[0] in ("mdgd", "mdgd-gm"), f"{name}: {text}"


def _order(runs: Mapping[str, Result]) -> Iterator[tuple[bool, str]]:
    order = ("model-tailor", "fine-tune", "lora")
    found = _summaries(published()["llava-flickr30k"], runs)
    if {"mdgd", "mdgd-gm", *order} <= found.keys():
        for i, column in enumerate(("Avg", "Hscore")):
            values = [min(found["mdgd"][i], found["mdgd-gm"][i]), *(found[method][i] for method in order)]
            text = ", ".join(f"{method} {found[method][i]:.2f}" for method in ("mdgd", "mdgd-gm", *order))
            yield all(a > b for a, b in pairwise(values)), f"{column}: {text}"


def _aligned(runs: Runs) -> Iterator[tuple[bool, str]]:
    for name in published():
        found = masking(runs.get(name, {}))
        if found:
            cos = float(np.interp(0.5, found["ratio"], found["cos"]))
            yield cos > 0.7, f"{name}: {cos:.2f}"


def _summaries(experiment: PublishedExperiment, runs: Mapping[str, Result]) -> dict[str, tuple[float, float]]:
    """Method -> Avg and Hscore, for complete runs of the paper's systems."""
    complete = {
        m: runs[m].scores for m in experiment.rows if m in runs and set(experiment.tasks) <= set(runs[m].scores)
    }
    totals = {method: summary([scores[task] for task in experiment.tasks]) for method, scores in complete.items()}
    return {method: (total.average, total.h(experiment.hscore)) for method, total in totals.items()}
