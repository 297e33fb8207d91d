"""What two measurements of one set say together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch

from torch_mdgd.diagnostics import effective_rank
from torch_mdgd.models.tap import visual_alignment_loss
from torch_mdgd.report.measure import Measured
from torch_mdgd.report.probes import Probe, tasks_of

FORMAT = "torch_mdgd forgetting report 1"
LOST, FORM, WRONG, GAINED, SAME = "knowledge lost", "form lost", "answer lost", "gained", "unchanged"
OUTCOMES = (LOST, FORM, WRONG, GAINED, SAME)


@dataclass(frozen=True)
class Change:
    """A share of right answers, in percent, before and after.

    Attributes:
        before: with the first weights.
        after: with the second.
        half: half a 95 % interval of their difference, 1.96 · s / √n over the probes' paired differences; None for
            fewer than two probes.
    """

    before: float
    after: float
    half: float | None

    @classmethod
    def of(cls, before: Sequence[bool], after: Sequence[bool]) -> "Change":
        """From what was right of the same probes."""
        moved = [int(b) - int(a) for a, b in zip(before, after, strict=True)]
        half = 196 * stdev(moved) / math.sqrt(len(moved)) if len(moved) > 1 else None
        return cls(100 * fmean(before), 100 * fmean(after), half)


@dataclass(frozen=True)
class Score:
    """Of one task, or of all.

    Attributes:
        task: its name.
        count: of probes.
        chance: percent that guessing among the allowed answers gets; None without such.
        restricted: knowledge: how often the right answer is the likeliest of those allowed; None without such.
        exact: form too: how often the generated answer is the right one.
    """

    task: str
    count: int
    chance: float | None
    restricted: Change | None
    exact: Change


@dataclass(frozen=True)
class Layer:
    """Hidden states at image tokens behind one decoder layer.

    Attributes:
        layer: 0 for what enters the first, the last for what leaves the decoder.
        rank_before: effective rank (4) with the first weights; None where it is not defined.
        rank_after: with the second.
        drift: the mean of |z − z_before| over that of |z_before|, in percent.
    """

    layer: int
    rank_before: float | None
    rank_after: float | None
    drift: float | None


@dataclass(frozen=True)
class Answer:
    """One probe, before and after.

    Attributes:
        task: its task.
        question: what was asked.
        right: the right answer.
        generated: before and after.
        chosen: the likeliest of the allowed answers, before and after; None without such.
        outcome: one of ``OUTCOMES``.
    """

    task: str
    question: str
    right: str
    generated: tuple[str | None, str | None]
    chosen: tuple[str | None, str | None]
    outcome: str


@dataclass(frozen=True)
class SetComparison:
    """A set of probes, before and after.

    Attributes:
        name: "probes" or "new task".
        scores: of its tasks.
        total: of all of them.
        loss: −log p of the right answers' tokens, the mean over probes, in nats, before and after.
        kl: KL(before ‖ after) in nats, the mean over tokens of right answers; None if the vocabularies differ.
        layers: by decoder layer.
        answers: by probe; of batches of a user's own, none.
    """

    name: str
    scores: tuple[Score, ...]
    total: Score
    loss: tuple[float, float]
    kl: float | None
    layers: tuple[Layer, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Compared:
    """A model before and after.

    Args:
        before: what the first weights are called.
        after: what the second are called.
        step: of training, where it was measured during it.
        sets: the probes, and the new task where there is one.
        pictures: the probes of each set, for the page.
        trace: ``step`` and :attr:`numbers` of earlier ones with the same weights before, in order.
    """

    before: str
    after: str
    step: int | None
    sets: tuple[SetComparison, ...]
    pictures: tuple[tuple[Probe, ...], ...] = field(default=(), repr=False)
    trace: tuple[dict[str, float], ...] = field(default=(), repr=False)

    @property
    def start(self) -> dict[str, float]:
        """``step`` 0 and :attr:`numbers` of the weights before."""
        out: dict[str, float] = {"step": 0, **dict.fromkeys(self.numbers, 0.0)}
        for one in self.sets:
            name = one.name.replace(" ", "_")
            if one.total.restricted is not None:
                out[f"{name}_restricted"] = one.total.restricted.before
            out[f"{name}_exact"] = one.total.exact.before
        return out

    @property
    def numbers(self) -> dict[str, float]:
        """What a training log takes: scores in percent, KL in nats and the last layer's drift in percent, by name."""
        out = {}
        for one in self.sets:
            name = one.name.replace(" ", "_")
            if one.total.restricted is not None:
                out[f"{name}_restricted"] = one.total.restricted.after
            out[f"{name}_exact"] = one.total.exact.after
            drift = one.layers[-1].drift
            out |= {key: x for key, x in ((f"{name}_kl", one.kl), (f"{name}_drift", drift)) if x is not None}
        return out

    def as_dict(self) -> dict[str, Any]:
        """Everything but pictures, as JSON has it: NaN is null."""
        sets = [{**asdict(one), "outcomes": outcomes(one)} for one in self.sets]
        head = {"format": FORMAT, "before": self.before, "after": self.after, "step": self.step}
        found: dict[str, Any] = _finite({**head, "sets": sets, "trace": self.trace})
        return found


def compare(
    name: str, probes: Sequence[Any], before: Measured, after: Measured, layers: Sequence[int]
) -> SetComparison:
    """Two measurements of the same probes, or of the same batches.

    Raises:
        ValueError: the features have other shapes, so these are two different networks.
    """
    if before.z.shape != after.z.shape:
        raise ValueError(
            f"{name}: features have shape {tuple(before.z.shape)} before and {tuple(after.z.shape)} after: a report is "
            "about one network with two sets of weights"
        )
    asked = [probe for probe in probes if isinstance(probe, Probe)]
    scores = [_score(task, asked, before, after, task) for task in tasks_of(asked)]
    answers = [
        Answer(
            probe.task,
            probe.question,
            probe.answer,
            (before.generated[i], after.generated[i]),
            (before.chosen[i], after.chosen[i]),
            _outcome(probe, *((m.chosen[i], m.exact[i]) for m in (before, after))),
        )
        for i, probe in enumerate(asked)
    ]
    found = tuple(_layer(*three) for three in zip(layers, before.z, after.z, strict=True))
    total = _score("all", asked, before, after, None)
    losses = fmean(before.loss), fmean(after.loss)
    return SetComparison(name, tuple(scores), total, losses, kl(before, after), found, tuple(answers))


def outcomes(one: SetComparison) -> dict[str, int]:
    """How many answers became what."""
    return {name: sum(x.outcome == name for x in one.answers) for name in OUTCOMES}


def kl(before: Measured, after: Measured) -> float | None:
    """KL(p_before ‖ p_after) = Σ p_before (log p_before − log p_after), in nats, the mean over tokens."""
    p, q = before.log_p.double(), after.log_p.double()
    if p.shape != q.shape:
        return None
    # What has no probability in the first adds nothing.
    each = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1)
    return max(0.0, float(each.mean()))


def _score(name: str, probes: Sequence[Probe], before: Measured, after: Measured, task: str | None) -> Score:
    at = [i for i in range(len(before.exact)) if task is None or probes[i].task == task]
    listed = [i for i in at if probes and probes[i].choices]
    restricted, chance = None, None
    if listed:
        right = [[m.chosen[i] == probes[i].answer for i in listed] for m in (before, after)]
        restricted, chance = Change.of(*right), 100 * fmean(probes[i].chance or 0.0 for i in listed)
    exact = Change.of(*([m.exact[i] for i in at] for m in (before, after)))
    return Score(name, len(at), chance, restricted, exact)


def _outcome(probe: Probe, before: tuple[str | None, bool], after: tuple[str | None, bool]) -> str:
    if not probe.choices:
        return SAME if before[1] == after[1] else WRONG if before[1] else GAINED
    knew, knows = before[0] == probe.answer, after[0] == probe.answer
    if knew != knows:
        return LOST if knew else GAINED
    if before[1] == after[1]:
        return SAME
    return FORM if before[1] else GAINED


def _layer(layer: int, before: torch.Tensor, after: torch.Tensor) -> Layer:
    size = float(before.abs().mean()) if before.numel() else 0.0
    drift = 100 * float(visual_alignment_loss(after, before)) / size if size else None
    return Layer(layer, _rank(before), _rank(after), drift)


def _rank(z: torch.Tensor) -> float | None:
    return effective_rank(z) if z.numel() and bool(z.isfinite().all()) and bool(z.any()) else None


def _finite(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
