"""`python -m reproductions list`: what there is, what it takes, and what has run."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from reproductions.methods import METHODS
from reproductions.paper.config import PRESET_NAMES, experiment_names, load_experiment, load_preset, methods_of
from reproductions.paper.data import DATASETS
from reproductions.paper.run.estimate import (
    ASSUMPTIONS,
    CARDS,
    Estimate,
    copies,
    downloads,
    estimate,
    fitting,
    size_of,
)
from reproductions.paper.run.preset import tell
from reproductions.shared.files import read_json

HEADS = (
    "method", "numbers trained", "train h", "evaluate h", "analyse h", "GPU GB", *CARDS, "host GB", "disk GB",
    "has run",
)  # fmt: skip
FIGURES = {
    "1": ("effective rank of what is seen before and after fine-tuning, by task", ("zero-shot", "fine-tune"), ""),
    "2": ("t-SNE of features of MiniCPM", ("zero-shot", "fine-tune", "mdgd"), "minicpm"),
    "3": ("learning curves; agreement and drift against the masking ratio", ("fine-tune", "mdgd", "mdgd-gm"), ""),
    "4": ("effective rank of what is seen, by task", ("zero-shot", "fine-tune", "mdgd"), ""),
    "5": ("t-SNE of features of LLaVA", ("zero-shot", "fine-tune", "mdgd"), "llava"),
}
"""What they show, the methods that they need, and of which experiments: those whose names begin so."""


def print_list(overrides: Sequence[str], results: Path, console: Console, *, beyond: bool = False) -> None:
    """Print all rows of the tables, or those beyond them too; figures, downloads and totals."""
    more = [name for name, method in METHODS.items() if not method.in_paper]
    rows: list[Estimate] = []
    fetched: dict[str, float] = {}
    copied: dict[str, float] = {}
    for name in experiment_names():
        experiment = load_experiment(name, overrides)
        table = Table(title=f"{name}: {experiment.title}", title_justify="left")
        for head in HEADS:
            table.add_column(head, justify="left" if head in ("method", "has run") else "right")
        wanted: list[str] = [*methods_of(experiment.model), *(more if beyond else ())]
        for method in wanted:
            found = estimate(experiment, method)
            table.add_row(*cells(method, found, fitting(experiment, method)), stage(results / experiment.name / method))
            rows.append(found)
        console.print(table)
        own = downloads(experiment, wanted)
        copied |= {what: max(size, copied.get(what, 0.0)) for what, size in copies(experiment, wanted).items()}
        fetched |= {what: max(size, fetched.get(what, 0.0)) for what, size in own.items()}
        sizes = ", ".join(f"{DATASETS[task].title} {own[task]:.1f}" for task in experiment.tasks)
        weights = f"{experiment.model} {own[experiment.model]:.1f}"
        console.print(
            f"{size_of(experiment.model).total:,} parameters. To fetch, GB: {weights}, {sizes}\n", soft_wrap=True
        )
    console.print(
        "analyse h: the short trainings of Figures 3b and 3c. 24, 48, 80 GB: whether a card of so much holds the row: "
        "yes; with r, --set training.reference=cpu; with 8, --set training.optimizer=adamw8bit; with q, --set "
        "training.quantize=all; or –, not so. host GB: as it is, and what r makes of it. disk GB: what stays + "
        "checkpoints while it trains. ?: nothing tells it but the weights\n",
        soft_wrap=True,
    )
    for name in PRESET_NAMES:
        console.print(f"run --preset {name}")
        tell(name, str(load_preset(name)[0]), overrides, console)
    console.print("")
    for number, (what, methods, kind) in FIGURES.items():
        needed = [results / name / method for name in experiment_names() if name.startswith(kind) for method in methods]
        done = sum(stage(folder).startswith("done") for folder in needed)
        rows_of = f"{', '.join(methods)} of {'both ' + kind if kind else 'all'} experiments"
        console.print(f"Figure {number}: {what}. {done} of {len(needed)} rows: {rows_of}", soft_wrap=True)
    console.print(f"Beyond the paper, with what they take by --beyond: {', '.join(more)}\n", soft_wrap=True)
    hours, memory = sum(found.hours for found in rows), max(found.memory for found in rows)
    disk = sum(found.disk for found in rows) + 2 * max(found.checkpoints for found in rows)
    unpacked = sum(copied.values())
    console.print(
        f"All rows: about {hours:.0f} GPU hours, {hours / 2:.0f} on two GPUs of {memory / 1e9:.0f} GB or more; "
        f"{sum(fetched.values()):.0f} GB to fetch, {unpacked:.0f} GB for the copy that `datasets` makes of the data, "
        f"and up to {disk / 1e9:.0f} GB of results and, while two rows train, of checkpoints.\n"
        f"Estimated from parameter and token counts for {ASSUMPTIONS}; the formulas are in estimate.py.",
        soft_wrap=True,
    )


def cells(method: str, found: Estimate, fits: Mapping[str, tuple[str, Estimate] | None]) -> list[str]:
    """A row of the list, without what has run."""
    if found.trained is None:
        return [method, "?", "?", f"{found.evaluation_hours:.1f}", *["?"] * (len(HEADS) - 5)]
    host = max(there[1].host for there in fits.values() if there) if any(fits.values()) else found.host
    return [
        method,
        f"{found.trained:,}" if found.trained else "–",
        f"{found.training_hours:.1f}" if found.training_hours else "–",
        f"{found.evaluation_hours:.1f}",
        f"{found.analysis_hours:.1f}" if found.analysis_hours else "–",
        f"{found.memory / 1e9:.0f}",
        *("–" if there is None else there[0] or "yes" for there in fits.values()),
        f"{found.host / 1e9:.0f}" + (f", r {host / 1e9:.0f}" if host > found.host else ""),
        f"{found.disk / 1e9:.1f} + {found.checkpoints / 1e9:.0f}" if found.disk else "–",
    ]


def stage(folder: Path) -> str:
    """How far a run is."""
    try:
        found = read_json(folder / "status.json", "stage", "wall_seconds")
    except (OSError, ValueError):
        return "–"
    return f"{found['stage']}, {found['wall_seconds'] / 3600:.1f} h"
