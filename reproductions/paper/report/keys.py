"""Other metrics of the same answers, at no cost: beside the number of the table, what else it might have been."""

from collections.abc import Mapping

from reproductions.methods import METHODS
from reproductions.paper.data import DATASETS
from reproductions.paper.report.results import Result
from reproductions.shared.tables import Table

TITLES = {
    "any_annotator": "any annotator", "f1_categories": "F1, mean of categories", "f1_llava": "F1 by LLaVA's script",
    "answered": "yes or no", "yes_no": "yes or no", "open": "open", "bleu_4": "BLEU-4", "rouge_l": "ROUGE-L",
    "accuracy": "accuracy",
}  # fmt: skip


def key_table(title: str, runs: Mapping[str, Result]) -> Table | None:
    """The second keys of all tasks, a column each; None where there are none."""
    columns: dict[tuple[str, str], None] = {}
    for run in runs.values():
        for task, found in run.evaluation.items():
            columns |= {(task, key): None for key in found["scores"] if key in TITLES}
    if not columns:
        return None
    rows = []
    for method, run in runs.items():
        scores = {task: found["scores"] for task, found in run.evaluation.items()}
        cells = [scores.get(task, {}).get(key) for task, key in columns]
        name = METHODS[method].title if method in METHODS else method
        rows.append((name, *("–" if cell is None else f"{cell:.2f}" for cell in cells)))
    heads = [f"{DATASETS[task].title}: {TITLES[key]}" for task, key in columns]
    smoke = any(run.smoke for run in runs.values())
    notes = ["Smoke: tiny random models on drawn pictures; shows that everything runs, and nothing else."] * smoke
    return Table(f"{title}: other metrics of the same answers", ("method", *heads), tuple(rows), tuple(notes))
