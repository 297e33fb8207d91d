"""What happened, before anything else: five sentences and one picture, made from the results."""

import textwrap
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from reproductions.mini.experiment.outcomes import CellOutcomes
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.report.verdicts import FEWEST_SEEDS, best
from reproductions.shared.figures import label, save
from reproductions.shared.stats import Difference

SENTENCES = 5
SHOWN = (
    "fine-tune", "fine-tune-low", "mdgd", "align", "anchor", "lora-all", "lora-align", "lora-anchor", "l2-sp", "replay",
)  # fmt: skip
"""The rows of the picture, from the top."""

LEARNED, KEPT = "#D55E00", "#0072B2"

Cells = Sequence[CellOutcomes]
Sentence = Callable[[Cells], str | None]


def sentences(cells: Cells) -> list[str]:
    """What the results say first: the first five that they suffice for, with 95 % intervals, cell by cell."""
    tested = [cell for cell in cells if cell.systems]
    return list(islice(filter(None, (tell(tested) for tell in _SENTENCES)), SENTENCES))


def _forgets(cells: Cells) -> str | None:
    told = _told(cells, lambda cell: _plus_minus(cell, "P", "fine-tune", "zero-shot"))
    return told and (
        "Plain fine-tuning, at the rate that learns best, changes P, what is still answered of the pre-trained tasks, "
        f"by {told}."
    )


def _keeps(cells: Cells) -> str | None:
    told = _told(cells, lambda cell: _both(*(_plus_minus(cell, m, "mdgd", "fine-tune-low") for m in ("P", "T"))))
    return told and (
        "Against fine-tuning at the rate with the best H, the harmonic mean of P and T, where T is what was learned, "
        f"MDGD changes P and then T by {told}."
    )


def _alone(cells: Cells) -> str | None:
    told = _told(cells, lambda cell: _plus_minus(cell, "H", "mdgd", "align"))
    return told and f"Beside its term αv alone, the whole of MDGD changes H by {told}."


def _anchored(cells: Cells) -> str | None:
    told = _told(cells, lambda cell: _plus_minus(cell, "H", "anchor", "align"))
    return told and f"Against αv the anchor, which takes one pass, changes H by {told}."


def _anchored_lora(cells: Cells) -> str | None:
    told = _told(cells, lambda cell: _plus_minus(cell, "H", "lora-anchor", "lora-all"))
    return told and f"The anchor changes H of LoRA on all layers by {told}."


def _best(cells: Cells) -> str | None:
    told = _told(cells, _best_of)
    return told and f"Of all that know nothing of the old tasks, these have the highest mean H: {told}."


def _form(cells: Cells) -> str | None:
    shown = [cell for cell in cells if cell.cell.target == "caption"]
    told = _told(shown, _form_of)
    return told and (
        "Form and sight apart: after captions plain fine-tuning answers old questions word for word, and finds the "
        f"right answer the likeliest of the task's own, in {told}."
    )


_SENTENCES: tuple[Sentence, ...] = (_forgets, _keeps, _alone, _anchored, _anchored_lora, _best, _form)


def _told(cells: Cells, value: Callable[[CellOutcomes], str | None]) -> str | None:
    found = [(cell.title, value(cell)) for cell in cells]
    return "; ".join(f"{told} ({title})" for title, told in found if told) or None


def _plus_minus(cell: CellOutcomes, measure: str, name: str, baseline: str) -> str | None:
    found: Difference | None = cell.difference(measure, name, baseline)
    return None if found is None or found.n < FEWEST_SEEDS else f"{found:+.1f}".replace("-", "−")


def _both(one: str | None, other: str | None) -> str | None:
    return f"{one} and {other}" if one and other else None


def _best_of(cell: CellOutcomes) -> str | None:
    name = best(cell)
    return None if name is None else f"{SYSTEMS[name].label} {_mean(cell, name, 'H'):.1f}"


def _form_of(cell: CellOutcomes) -> str | None:
    if "fine-tune" not in cell.systems:
        return None
    return f"{_mean(cell, 'fine-tune', 'P exact'):.1f} and {_mean(cell, 'fine-tune', 'P restricted'):.1f} %"


def _mean(cell: CellOutcomes, name: str, measure: str) -> float:
    return fmean(cell.systems[name].values(measure).values())


def draw_opening(cells: Cells, output: Path) -> list[Path]:
    """Draw `opening-<cell>.png`, a panel of the page's first picture, for every cell with two of its systems."""
    output.mkdir(parents=True, exist_ok=True)
    shown = [cell for cell in cells if len(_rows(cell)) > 1]
    lowest = min((_mean(cell, name, measure) for cell in shown for name in _rows(cell) for measure in "TP"), default=0)
    return [save(_panel(cell, lowest - 2), output / f"opening-{cell.cell.name}.png") for cell in shown]


def _rows(cell: CellOutcomes) -> list[str]:
    return [name for name in SHOWN if name in cell.systems]


def _panel(cell: CellOutcomes, left: float) -> Figure:
    """For each system what was learned and what was kept, as two dots on one line; panels share their axis."""
    names, title = _rows(cell), textwrap.wrap(cell.title, 36)
    height = 0.75 + 0.15 * len(title) + 0.3 * len(names)
    figure, axis = plt.subplots(figsize=(4.4, height), layout="constrained")
    for row, name in enumerate(reversed(names)):
        T, P = (_mean(cell, name, measure) for measure in ("T", "P"))
        axis.plot([T, P], [row, row], color="0.8", linewidth=3, zorder=0, solid_capstyle="round")
        axis.plot(T, row, "s", color=LEARNED, clip_on=False, label="learned, T" if row == 0 else None)
        axis.plot(P, row, "o", color=KEPT, clip_on=False, label="kept, P" if row == 0 else None)
    axis.set_yticks(range(len(names)), [SYSTEMS[name].marked for name in reversed(names)])
    axis.set_xlim(left, 100.8)
    axis.set_ylim(-0.5, len(names) - 0.5)
    axis.grid(axis="x", alpha=0.2)
    label(axis, "\n".join(title), "%", "")
    figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9, handletextpad=0.2)
    return figure
