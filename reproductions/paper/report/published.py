"""Tables 1 and 2 as they were published."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class PublishedRow:
    """One system of a table.

    Attributes:
        experiment: the half of a table that it stands in.
        method: name of the system.
        label: what the table calls it.
        params: numbers trained, as printed.
        trained: numbers trained, exactly, where the architecture tells.
        scores: data set -> percent, the target last.
        average: the column Avg.
        hscore: the column Hscore.
        incomparable: data set -> why its number is of another quantity than ours, in this row alone.
    """

    experiment: str
    method: str
    label: str
    params: str
    trained: int | None
    scores: Mapping[str, float]
    average: float
    hscore: float
    incomparable: Mapping[str, str]


@dataclass(frozen=True)
class PublishedExperiment:
    """One half of a table.

    Attributes:
        name: of the experiment.
        table: 1 or 2.
        model: what was fine-tuned.
        pretrained: data sets that show what is forgotten, in the table's order.
        target: data set that was learned.
        hscore: which of `scores.H_SCORES` the table's Hscore is.
        rows: method -> row, in the table's order.
        incomparable: data set -> why its published numbers are of another quantity than ours.
    """

    name: str
    table: int
    model: str
    pretrained: tuple[str, ...]
    target: str
    hscore: str
    rows: Mapping[str, PublishedRow]
    incomparable: Mapping[str, str] = field(default_factory=dict)

    @property
    def tasks(self) -> tuple[str, ...]:
        """Every data set, the target last."""
        return (*self.pretrained, self.target)

    @property
    def kept(self) -> tuple[str, ...]:
        """The pre-trained data sets whose published numbers are of the quantity that is measured here."""
        return tuple(task for task in self.pretrained if task not in self.incomparable)


@cache
def published() -> dict[str, PublishedExperiment]:
    """All experiments by name, in the order of the tables."""
    return {name: _experiment(name, values) for name, values in json.loads(_FILE.read_text()).items()}


def _experiment(name: str, values: dict) -> PublishedExperiment:
    pretrained, target = tuple(values["pretrained"]), values["target"]
    rows = {}
    for row in values["rows"]:
        scores = dict(zip((*pretrained, target), row["scores"], strict=True))
        rows[row["method"]] = PublishedRow(
            name, row["method"], row["label"], row["params"], row["trained"], scores, row["average"], row["hscore"],
            row.get("incomparable", {}),
        )  # fmt: skip
    return PublishedExperiment(
        name, values["table"], values["model"], pretrained, target, values["hscore"], rows, values["incomparable"]
    )
