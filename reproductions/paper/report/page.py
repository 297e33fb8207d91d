"""One self-contained HTML page: what ran, the tables, the figures, answers beside pictures, and the configurations."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from reproductions.paper.data import DATASETS
from reproductions.paper.report.figures import draw_all
from reproductions.paper.report.findings import Finding, findings
from reproductions.paper.report.published import published
from reproductions.paper.report.results import Result, read_results
from reproductions.paper.report.tables import Comparison, Line, beside, comparisons, trained_cell
from reproductions.shared.page import document, embedded, figure, navigation
from reproductions.shared.tables import Table

SHOWN, AMONG = 4, 12
"""Examples of each task on the page, and how many of the first they are chosen from: runs keep pictures of those."""

CAPTIONS = {
    "figure1": "Figure 1. Effective rank of visual features before and after fine-tuning. Published: fine-tuning "
    "lowers it on every task.",
    "figure2": "Figure 2. t-SNE of features of MiniCPM. Published: fine-tuning moves the visual features away, MDGD "
    "keeps them near the pre-trained ones.",
    "figure3": "Figure 3. Learning curves; agreement of the decoupled gradients and visual drift against the masking "
    "ratio. Published: MDGD learns as fast, and 70 % of the agreement is left at a ratio of one half.",
    "figure4": "Figure 4. Effective rank of the last hidden layer at image tokens. Published: MDGD lies above "
    "fine-tuning, and on LLaVA at or above the pre-trained model.",
    "figure5": "Figure 5. t-SNE of features of LLaVA.",
}


def write_report(results: Path, output: Path) -> Path:
    """Write the page.

    Args:
        results: folder of all runs.
        output: the HTML file, or a folder for `report.html`; made if it is not there.

    Returns:
        the file written.

    Raises:
        FileError: the results cannot be read.
    """
    path = output if output.suffix == ".html" else output / "report.html"
    runs = read_results(results)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_page(runs, comparisons(results), beside(results), _figures(results)), encoding="utf-8")
    return path


def _page(
    runs: Mapping[str, Mapping[str, Result]], tables: Sequence[Comparison], more: Sequence[Table], figures: str
) -> str:
    everything = [run for methods in runs.values() for run in methods.values()]
    sections = ("Findings", "Tables", "Figures", "Answers", "Runs")
    parts = [
        "<h1>Modality-decoupled gradient descent: the paper's experiments</h1>",
        f'<p class="faint">{_overview(everything)}</p>',
        _banner(everything),
        navigation(sections),
        '<h2 id="findings">Findings</h2>',
        "<p>What the paper found, and whether the runs here agree. Smoke runs are no evidence.</p>",
        f'<ul class="findings">{"".join(map(_finding, findings(runs)))}</ul>',
        '<h2 id="tables">Tables</h2>',
        "<p>Each system as published, as measured here, and the difference in percentage points. Hscore is the "
        "harmonic mean that the table used; H(P, T) weighs what was kept against what was learned.</p>",
        *(_table(table) for table in tables),
        *(table.html for table in more),
        '<h2 id="figures">Figures</h2>',
        figures or '<p class="faint">No run has left data for a figure yet.</p>',
        '<h2 id="answers">Answers</h2>',
        "<p>Where the systems differ most among the first examples of each task, and each answer's score in percent. "
        "Chosen to show what forgetting looks like, not how often it happens.</p>",
        *(_answers(name, methods, opened=i == 0) for i, (name, methods) in enumerate(runs.items())),
        '<h2 id="runs">Runs</h2>',
        *(_run(run) for run in everything),
    ]
    body = "\n".join(part for part in parts if part)
    return document("MDGD: the paper's experiments", body)


def _overview(runs: Sequence[Result]) -> str:
    rows = {(name, method) for name, experiment in published().items() for method in experiment.rows}
    measured = [(run.experiment, run.method) in rows for run in runs if run.done and not run.smoke]
    beyond = f" and {measured.count(False)} beyond the paper" if False in measured else ""
    smoke = sum(run.smoke for run in runs)
    also = f"; {smoke} smoke runs" if smoke else ""
    taken = _taken(sum(float(run.status.get("wall_seconds", 0)) for run in runs))
    devices = ", ".join(sorted({str(run.config.get("device", "an unknown device")) for run in runs}))
    return html.escape(
        f"{measured.count(True)} of the {len(rows)} published rows measured{beyond}{also}. "
        f"{taken} on {devices or 'nothing yet'}."
    )


def _taken(seconds: float) -> str:
    """A time, such as "1.4 hours", in the unit that suits it."""
    units = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    unit = next((unit for unit, size in units.items() if seconds >= size), "seconds")
    return f"{seconds / units[unit]:.1f} {unit}"


def _banner(runs: Sequence[Result]) -> str:
    smoke = sum(run.smoke for run in runs)
    if not smoke:
        return ""
    which = "All runs here are" if smoke == len(runs) else f"{smoke} of {len(runs)} runs here are"
    return (
        f'<div class="banner">SMOKE. {which} smoke runs: tiny random models on a few drawn pictures. '
        "Their numbers show that everything runs, and say nothing about the methods.</div>"
    )


def _finding(finding: Finding) -> str:
    mark, kind = {True: ("✓", "up"), False: ("✗", "down"), None: ("–", "faint")}[finding.holds]
    evidence = "".join(f"<div>{html.escape(line)}</div>" for line in finding.evidence or ("not measured yet",))
    return (
        f'<li><span class="mark {kind}">{mark}</span><div>{html.escape(finding.statement)}'
        f'<div class="faint">{evidence}</div></div></li>'
    )


def _table(table: Comparison) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("Method", "", "Trained", *table.columns))
    rows = "".join(_system(line, table.columns) for line in table.lines)
    notes = "".join(f'<p class="faint">{html.escape(note)}</p>' for note in table.notes)
    return (
        f'<h3>{html.escape(table.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>{notes}"
    )


def _system(line: Line, columns: Sequence[str]) -> str:
    rows = line.rows(columns)
    out = []
    for i, (kind, cells) in enumerate(rows):
        shown = "".join(f"<td{_direction(cell, kind)}>{cell}</td>" for cell in cells)
        label = html.escape(line.label) if i == 0 else ""
        style = " ".join(["first"] * (i == 0) + [kind] * (kind in ("published", "smoke")))
        head = f"<td>{label}</td><td>{html.escape(kind)}</td><td>{trained_cell(line, kind)}</td>"
        out.append(f'<tr class="{style}">{head}{shown}</tr>')
    return "".join(out)


def _direction(cell: str, kind: str) -> str:
    if kind != "difference" or cell == "–":
        return ""
    return ' class="down"' if cell.startswith("-") else ' class="up"'


def _figures(results: Path) -> str:
    with TemporaryDirectory() as folder:
        drawn = draw_all(results, Path(folder))
        return "".join(figure(path, CAPTIONS[path.stem]) for path in drawn)


def _answers(name: str, runs: Mapping[str, Result], opened: bool) -> str:
    order = [method for method in ("zero-shot", "fine-tune", "mdgd", "mdgd-gm") if method in runs]
    shown = {method: runs[method] for method in order or runs}
    first = next(iter(shown.values())).config["configuration"]
    tasks = [*first["pretrained"], first["target"]]
    cards = {task: list(_cards(task, shown)) for task in tasks}
    title = next(iter(runs.values())).config.get("title", name)
    inside = "".join(
        f'<h3>{html.escape(DATASETS[task].title)}</h3><div class="examples">{"".join(found)}</div>'
        for task, found in cards.items()
        if found
    )
    state = " open" if opened else ""
    return f"<details{state}><summary>{html.escape(title)}</summary>{inside}</details>" if inside else ""


def _cards(task: str, runs: Mapping[str, Result]) -> Iterable[str]:
    """Examples whose scores lie furthest apart, in their own order among equals."""
    answers = {method: run.predictions(task)[:AMONG] for method, run in runs.items()}
    answers = {method: lines for method, lines in answers.items() if lines}
    count = min(map(len, answers.values()), default=0)
    scores = {i: [float(lines[i]["score"] or 0) for lines in answers.values()] for i in range(count)}
    for i in sorted(scores, key=lambda i: min(scores[i]) - max(scores[i]))[:SHOWN]:
        picture = next(filter(None, (run.picture(task, i) for run in runs.values())), None)
        yield _card(
            {runs[method].config.get("method_title", method): lines[i] for method, lines in answers.items()}, picture
        )


def _card(answers: Mapping[str, Mapping], picture: Path | None) -> str:
    first = next(iter(answers.values()))
    image = f'<img alt="" loading="lazy" src="{embedded(picture.read_bytes(), "jpeg")}">' if picture else ""
    references = " / ".join(dict.fromkeys(map(str, first["answers"])))
    said = "".join(
        f"<dt>{html.escape(label)}</dt><dd>{html.escape(str(line['prediction'])) or '(nothing)'}</dd>"
        f'<dd class="score {"up" if (line["score"] or 0) >= 50 else "down"}">{line["score"] or 0:.0f}</dd>'
        for label, line in answers.items()
    )
    return (
        f'<div class="card">{image}<div class="question">{html.escape(str(first["question"]))}</div>'
        f'<dl><dt>reference</dt><dd class="wide">{html.escape(references)}</dd>{said}</dl></div>'
    )


def _run(run: Result) -> str:
    config, taken = run.config, _taken(float(run.status.get("wall_seconds", 0)))
    facts = [str(config.get("device", "")), taken, f"seed {config.get('seed')}"]
    facts += [str(config.get("git") or "unknown revision")[:12]]
    facts += [str(run.status.get("stage"))] * (not run.done) + ["SMOKE"] * run.smoke
    method = html.escape(str(config.get("method_title", run.method)))
    return (
        f"<details><summary><b>{html.escape(run.experiment)}</b> {method} "
        f'<span class="faint">{html.escape(", ".join(filter(None, facts)))}</span></summary>'
        f"<pre>{html.escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
    )
