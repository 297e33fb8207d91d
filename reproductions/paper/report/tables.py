"""The tables in the paper's layout: what was published, what was measured, and the difference."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from reproductions.methods import METHODS
from reproductions.paper.config import differences, load_experiment, method_of
from reproductions.paper.data import DATASETS
from reproductions.paper.report.keys import key_table
from reproductions.paper.report.published import PublishedExperiment, PublishedRow, published
from reproductions.paper.report.results import Result, read_seeds, settings_apart, unlike
from reproductions.paper.report.scores import summary
from reproductions.paper.report.seeds import seed_table
from reproductions.shared.fields import build
from reproductions.shared.scores import average
from reproductions.shared.stats import estimate
from reproductions.shared.tables import Table as PlainTable

NOTES = {
    "cider_no_ptb": "CIDEr without the Penn Treebank tokenizer, which needs Java: not the published form.",
    "smoke": "Smoke: tiny random models on drawn pictures; shows that everything runs, and nothing else.",
    "short": "Trained on a part of the examples, or for a set number of steps.",
    "limited": "Measured on a sample of each task.",
    "other": "Rows with other settings than the published experiment's have no difference; their settings are named.",
    "greedy": "MiniCPM-V-2.0's own chat searches with three beams and a repetition penalty of 1.2; here answers are "
    "greedy (--set evaluation.beams=3 --set evaluation.repetition_penalty=1.2 for its own).",
}
KEPT = "P, comparable"
"""The mean over the pre-trained tasks whose published numbers are of the quantity that is measured here."""


@dataclass(frozen=True)
class Line:
    """One system of a table.

    Attributes:
        method: its name.
        label: what the table calls it.
        params: numbers trained, as published; "" beyond the paper.
        trained: numbers trained in our run; None where there is no run or it does not say.
        published: column -> value; empty beyond the paper.
        ours: column -> value, those that are measured.
        state: "not run", "done", or the stage of an unfinished run.
        smoke: whether our numbers are of tiny random models.
        incomparable: columns whose published value is of another quantity.
        changed: settings that differ from the published experiment's.
        spread: column -> half a 95 % interval over seeds; empty for one seed.
    """

    method: str
    label: str
    params: str
    trained: int | None
    published: Mapping[str, float]
    ours: Mapping[str, float]
    state: str
    smoke: bool = False
    incomparable: frozenset[str] = frozenset()
    changed: tuple[str, ...] = ()
    spread: Mapping[str, float] = field(default_factory=dict)

    def rows(self, columns: Sequence[str]) -> list[tuple[str, list[str]]]:
        """What to print, one kind a row: "published", "ours" or "smoke", the "difference" of real numbers of one
        quantity that were made with the published settings, and the state of what is not done."""
        out = [("published", _cells(self.published, columns))] if self.published else []
        if self.ours:
            out.append(("smoke" if self.smoke else "ours", _cells(self.ours, columns)))
        if self.spread:
            out.append(("± 95 %", _cells(self.spread, columns)))
        if self.ours and self.published and not self.smoke and self.changed:
            out.append((f"other {', '.join(self.changed[:3])}", [""] * len(columns)))
        elif self.ours and self.published and not self.smoke:
            both = [c for c in columns if c in self.ours and c in self.published and c not in self.incomparable]
            apart = {column: round(self.ours[column], 2) - self.published[column] for column in both}
            out.append(("difference", _cells(apart, columns, "+.2f")))
        if self.state != "done":
            out.append((self.state, [""] * len(columns)))
        return out


@dataclass(frozen=True)
class Comparison:
    """One half of a table, beside our runs.

    Attributes:
        title: says the table, the model and the target.
        columns: data sets by title, then `KEPT`, Avg, Hscore and H(P, T).
        lines: in the order of the paper, ours beyond it last.
        notes: what one has to know to read our numbers.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]


def comparisons(results: Path) -> list[Comparison]:
    """Every half of the tables, and experiments of one's own, beside what a folder of results holds.

    Raises:
        FileError: the folder or a file in it cannot be read.
    """
    found = read_seeds(results)
    known = [compare(experiment, found.get(name, {})) for name, experiment in published().items()]
    return known + [compare(own(name, runs), runs) for name, runs in found.items() if name not in published()]


def beside(results: Path) -> list[PlainTable]:
    """What stands beside the comparisons: means over seeds, and other metrics.

    Raises:
        FileError: the folder or a file in it cannot be read.
    """
    out = []
    for name, runs in read_seeds(results).items():
        experiment = published().get(name) or own(name, runs)
        title = next(iter(runs.values()))[0].config.get("title", name)
        first = {method: some[0] for method, some in runs.items()}
        out += [seed_table(title, runs, experiment.tasks), key_table(title, first)]
    return [table for table in out if table is not None]


def compare(experiment: PublishedExperiment, seeds: Mapping[str, Sequence[Result]]) -> Comparison:
    """One half of a table beside its runs, by method; ours are the means over seeds that are complete."""
    runs = {method: some[0] for method, some in seeds.items()}
    columns = [DATASETS[task].title for task in experiment.tasks]
    columns += [KEPT, "Avg", "Hscore", "H(P, T)"] if experiment.table else ["Avg", "H(P, T)"]
    lines = [_published_line(experiment, row, seeds.get(row.method, [])) for row in experiment.rows.values()]
    lines += [_line(experiment, some) for name, some in seeds.items() if name not in experiment.rows]
    title = experiment.model
    if experiment.table:
        target = DATASETS[experiment.target].title
        title = f"Table {experiment.table}: {title} fine-tuned on {target} (Hscore = {experiment.hscore})"
    notes = (*_notes(runs.values(), lines), *unlike(seeds), *_quantities(experiment))
    return Comparison(title, tuple(columns), tuple(lines), notes)


def rich_tables(results: Path) -> list[Table]:
    """The tables for a terminal."""
    return [*map(_rich, comparisons(results)), *(table.rich for table in beside(results))]


def markdown(results: Path) -> str:
    """The tables for a text file."""
    return "\n".join([*map(_markdown, comparisons(results)), *(table.markdown for table in beside(results))])


def own(name: str, runs: Mapping[str, Sequence[Result]]) -> PublishedExperiment:
    """An experiment that the paper does not have, as a table without published rows."""
    config = next(iter(runs.values()))[0].config
    values = config["configuration"]
    return PublishedExperiment(
        name, 0, config.get("title", name), tuple(values["pretrained"]), values["target"], "H(P, T)", {}
    )


def _published_line(experiment: PublishedExperiment, row: PublishedRow, runs: Sequence[Result]) -> Line:
    values = _columns(experiment, row.scores) | {"Avg": row.average, "Hscore": row.hscore}
    if not runs:
        return Line(row.method, row.label, row.params, None, values, {}, "not run")
    return _line(experiment, runs, row, values)


def _line(
    experiment: PublishedExperiment,
    runs: Sequence[Result],
    row: PublishedRow | None = None,
    values: Mapping[str, float] | None = None,
) -> Line:
    run, complete = runs[0], [_columns(experiment, other.scores) for other in runs if other.done]
    label = row.label if row else run.config.get("method_title", run.method)
    state = "done" if run.done else f"unfinished: {run.status.get('stage')}"
    ours, spread = _columns(experiment, run.scores), {}
    if len(complete) > 1:
        label += f", {len(complete)} seeds"
        means = {column: estimate([values[column] for values in complete]) for column in ours}
        ours, spread = ({c: x.mean for c, x in means.items()}, {c: x.half for c, x in means.items()})
    return Line(
        run.method, label, row.params if row else "", run.trained, values or {}, ours, state, run.smoke,
        _incomparable(experiment, row), changed_settings(run) if row and not run.smoke else (), spread,
    )  # fmt: skip


def changed_settings(run: Result) -> tuple[str, ...]:
    """The settings of a run that differ from those of the published experiment that it has the name of."""
    ours, theirs = run.config["configuration"], load_experiment(run.experiment)
    expected = json.loads(json.dumps(theirs.as_dict()))
    found = settings_apart(expected, ours)
    for name, values in ours.get("methods", {}).items():
        settings = asdict(build(METHODS[name].Settings, values, str(run.folder)))
        found += [f"{name}.{key}" for key in differences(asdict(method_of(theirs, name).settings), settings)]
    return tuple(found)


def _incomparable(experiment: PublishedExperiment, row: PublishedRow | None) -> frozenset[str]:
    """Columns of other quantities, and the summaries that they enter."""
    alone = row.incomparable if row else {}
    tasks = {*experiment.incomparable, *alone}
    summaries = {"Avg", "Hscore", "H(P, T)"} if tasks else set()
    return frozenset({DATASETS[task].title for task in tasks} | summaries | ({KEPT} if alone else set()))


def _quantities(experiment: PublishedExperiment) -> list[str]:
    """Why columns have no difference, a line each."""
    notes = [f"{DATASETS[task].title} is not compared: {why}." for task, why in experiment.incomparable.items()]
    for row in experiment.rows.values():
        notes += [
            f"{DATASETS[task].title} of {row.label} is not compared: {why}." for task, why in row.incomparable.items()
        ]
    if notes:
        titles = ", ".join(DATASETS[task].title for task in experiment.kept)
        notes.append(f"Nor are Avg, Hscore and H(P, T), which they enter. {KEPT} is the mean over {titles}.")
    return notes


def _columns(experiment: PublishedExperiment, scores: Mapping[str, float]) -> dict[str, float]:
    """Column -> value; the summaries only where no score is missing."""
    out = {DATASETS[task].title: scores[task] for task in experiment.tasks if task in scores}
    if len(out) == len(experiment.tasks):
        total = summary([scores[task] for task in experiment.tasks])
        out[KEPT] = average({task: scores[task] for task in experiment.kept})
        out |= {"Avg": total.average, "Hscore": total.h(experiment.hscore), "H(P, T)": total.h("H(P, T)")}
    return out


def _notes(runs: Iterable[Result], lines: Iterable[Line]) -> tuple[str, ...]:
    notes = dict.fromkeys(NOTES, False)
    notes["other"] = any(line.changed for line in lines)
    for run in runs:
        notes["smoke"] |= run.smoke
        notes["cider_no_ptb"] |= any("cider_no_ptb" in found["scores"] for found in run.evaluation.values())
        configuration = run.config.get("configuration", {})
        limit, training = configuration.get("evaluation", {}).get("examples", 0), configuration.get("training", {})
        notes["limited"] |= bool(limit) and not run.smoke
        search = configuration.get("evaluation", {})
        notes["greedy"] |= configuration.get("model") == "minicpm-v-2" and search.get("beams", 1) == 1 and not run.smoke
        notes["short"] |= bool(training.get("steps") or training.get("examples")) and not run.smoke
    return tuple(text for name, text in NOTES.items() if notes[name])


def _cells(values: Mapping[str, float], columns: Sequence[str], form: str = ".2f") -> list[str]:
    return [format(values[column], form) if column in values else "–" for column in columns]


def trained_cell(line: Line, kind: str) -> str:
    """Numbers trained, for one of the rows of a line."""
    if kind == "published":
        return line.params
    return f"{line.trained:,}" if kind in ("ours", "smoke") and line.trained else ""


def _rich(comparison: Comparison) -> Table:
    table = Table(title=comparison.title, caption="\n".join(comparison.notes), title_justify="left")
    for head in ("Method", "", "#Params"):
        table.add_column(head, no_wrap=True)
    for column in comparison.columns:
        table.add_column(column, justify="right")
    for line in comparison.lines:
        rows = line.rows(comparison.columns)
        for i, (kind, cells) in enumerate(rows):
            head = line.label if i == 0 else ""
            shown = [_coloured(cell, kind) for cell in cells]
            table.add_row(head, kind, trained_cell(line, kind), *shown, end_section=i == len(rows) - 1,
                          style="dim" if kind == "published" else None)  # fmt: skip
    return table


def _coloured(cell: str, kind: str) -> Text:
    if kind == "smoke":
        return Text(cell, "yellow")
    if kind == "difference" and cell != "–":
        return Text(cell, "red" if cell.startswith("-") else "green")
    return Text(cell)


def _markdown(comparison: Comparison) -> str:
    head = ["Method", "", "#Params", *comparison.columns]
    out = [f"### {comparison.title}", "", _row(head), "|---|---|---:|" + "---:|" * len(comparison.columns)]
    for line in comparison.lines:
        rows = line.rows(comparison.columns)
        for i, (kind, cells) in enumerate(rows):
            out.append(_row([line.label if i == 0 else "", kind, trained_cell(line, kind), *cells]))
    return "\n".join([*out, "", *comparison.notes]) + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
