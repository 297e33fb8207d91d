"""One self-contained HTML page of the study: verdicts, tables, figures, and what each model now answers."""

import html
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from pathlib import Path

from PIL import Image
from rich.console import Console

from reproductions.mini.experiment.cells import ARCHITECTURES
from reproductions.mini.experiment.outcomes import CellOutcomes, load
from reproductions.mini.experiment.systems import SYSTEMS
from reproductions.mini.model.checkpoint import CHECKPOINTS, REPORT_FILE
from reproductions.mini.report.figures import draw_figures
from reproductions.mini.report.grouping import by_architecture
from reproductions.mini.report.opening import draw_opening, sentences
from reproductions.mini.report.tables import missing, summaries, tables
from reproductions.mini.report.verdicts import RULE, Verdict, claims_of, verdicts
from reproductions.mini.world.data import Example, pretrained_task_data, target_data
from reproductions.mini.world.questions import PRETRAINED_TASKS
from reproductions.shared.page import document, embedded, figure, navigation
from reproductions.shared.results import Result
from reproductions.shared.tables import Table

CAPTIONS = {
    "frontier": "What was learned against what was kept. Up and to the right is better.",
    "ranks": "Effective rank of the visual features before and after fine-tuning, after the paper's Figures 1 and 4.",
    "curves": "Learning curves, after Figure 3a.",
    "gradients": "Agreement and lengths of the gradients, and the visual loss, during fine-tuning.",
    "razor": "Forgetting against the divergence on the new task's prompts, after RL's Razor.",
    "masking": "Agreement of the decoupled gradients and visual drift by masking ratio, after Figures 3b and 3c.",
    "tsne": "t-SNE of visual and multimodal features, after Figures 2 and 5.",
}
ANSWERING = (
    "zero-shot",
    "fine-tune",
    "fine-tune-low",
    "mdgd",
    "align",
    "project",
    "history",
    "inputs",
    "mdgd-gm",
    "replay",
    "anchor",
    "lora-all",
    "lora-anchor",
)
SHOWN = 2
"""Examples of each task on the page, of the first that results keep answers to; one where all models agree on all."""

MARKS = {"holds here": ("✓", "up"), "does not hold here": ("✗", "down"), "cannot tell": ("–", "faint")}
_STYLE = Path(__file__).with_name("page.css")


def write_report(results: Path, output: Path, console: Console) -> Path:
    """Print the tables; write `report.html`, `tables.md`, `verdicts.md` and the figures.

    Args:
        results: folder of `tune.jsonl`, `test.jsonl` and `frontier.jsonl`, as far as they are there.
        output: folder; made if it is not there.
        console: for the tables.

    Returns:
        the page.

    Raises:
        FileNotFoundError: there is no folder `results`.
    """
    cells = load(results)
    figures = draw_figures(results, cells, output / "figures")
    opening = draw_opening(cells, output / "figures")
    found = {cell.title: tables(cell) for cell in cells if cell.systems}
    judged = judge(cells)
    summary = summaries(cells)
    shown = [*summary, *(table for own in found.values() for table in own)]
    for table in shown:
        console.print(table.rich)
    (output / "tables.md").write_text("\n".join(table.markdown for table in shown), encoding="utf-8")
    (output / "verdicts.md").write_text(verdicts_markdown(judged), encoding="utf-8")
    page = output / "report.html"
    page.write_text(_page(cells, summary, found, judged, opening, figures), encoding="utf-8")
    return page


Judged = Mapping[str, Sequence[tuple[str, Sequence[Verdict]]]]


def judge(cells: Sequence[CellOutcomes]) -> Judged:
    """Of each architecture, and last of all models together: the title of each cell, and what becomes of each claim.

    Claims whose systems were tested in none of a group's cells are left out there.
    """
    claims = claims_of(cells)
    return {
        name: _told([(cell.title, verdicts(cell, claims)) for cell in own])
        for name, own in by_architecture(cells).items()
    }


def _told(columns: Sequence[tuple[str, list[Verdict]]]) -> list[tuple[str, list[Verdict]]]:
    found = zip(*(column for _, column in columns), strict=True)
    kept = [any(not v.evidence.startswith("not measured") for v in same) for same in found]
    return [(title, list(compress(column, kept))) for title, column in columns]


def verdicts_markdown(judged: Judged) -> str:
    """A table of claims for each architecture, a column a cell that has results."""
    told = []
    for name, own in judged.items():
        columns = ("claim", "by", *(title for title, _ in own))
        rows = tuple(
            (same[0].claim.text, _by(same[0]), *(f"**{v.outcome}**: {v.evidence}" for v in same))
            for same in zip(*(found for _, found in own), strict=True)
        )
        told.append(Table(_titled("Verdicts", name, judged), columns, rows, (RULE,)).markdown.replace("---:", "---"))
    return "\n".join(told)


def _titled(title: str, architecture: str, judged: Judged) -> str:
    return f"{title}: {architecture}" if len(judged) > 1 else title


def _by(verdict: Verdict) -> str:
    return "the paper" if verdict.claim.paper else "here"


def _page(
    cells: Sequence[CellOutcomes],
    summary: Sequence[Table],
    found: Mapping[str, Sequence[Table]],
    judged: Judged,
    opening: Sequence[Path],
    figures: Sequence[Path],
) -> str:
    sections = ("Verdicts", "Figures", "Tables", "Answers")
    body = "\n".join(
        [
            "<h1>Modality-decoupled gradient descent: the small study</h1>",
            _opening(cells, opening),
            f'<p class="faint">{html.escape(_overview(cells))}</p>',
            navigation(sections),
            '<h2 id="verdicts">Verdicts</h2>',
            f"<p>{html.escape(RULE)}</p>",
            _verdicts(judged),
            '<h2 id="figures">Figures</h2>',
            "".join(figure(path, CAPTIONS[path.stem.split("-")[0]]) for path in figures)
            or '<p class="faint">The results do not suffice for a figure yet.</p>',
            '<h2 id="tables">Tables</h2>',
            *(table.html for table in summary),
            *(_folded(title, "".join(table.html for table in own)) for title, own in found.items()),
            '<h2 id="answers">Answers</h2>',
            "<p>What each model answers to test examples after fine-tuning, first seed. Chosen among the first of each "
            "task for the most disagreement: they show what forgetting looks like, not how often it happens.</p>",
            *(_answers(cell) for cell in cells if cell.systems),
            '<p class="faint">Drawings: OpenMoji, CC BY-SA 4.0. Handwritten digits: UCI optical recognition set.</p>',
        ]
    )
    return document("MDGD: the small study", body, _STYLE.read_text(encoding="utf-8"))


def _opening(cells: Sequence[CellOutcomes], panels: Sequence[Path]) -> str:
    """The sentences, and the picture in panels that stand beside each other where there is room."""
    told = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences(cells))
    images = "".join(f'<img alt="{html.escape(path.stem)}" src="{embedded(path.read_bytes())}">' for path in panels)
    caption = (
        "What was learned (T) and what was kept (P), test scores in percent, means over seeds. After captions P is the "
        "share of old questions whose right answer is the likeliest of the task's own."
    )
    picture = f'<figure class="panels">{images}<figcaption>{caption}</figcaption></figure>' if panels else ""
    return f'<ul class="told">{told}</ul>{picture}' if told else picture


def _overview(cells: Sequence[CellOutcomes]) -> str:
    told = []
    runs = [run for cell in cells for outcome in cell.systems.values() for run in outcome.runs.values()]
    tested = [cell for cell in cells if cell.systems]
    for cell in tested:
        # What is not trained stands for every seed of the study.
        seeds = {seed for name, outcome in cell.systems.items() if name != "zero-shot" for seed in outcome.runs}
        told.append(f"{cell.title}: {len(cell.systems)} systems, {len(seeds)} seeds")
    models = dict.fromkeys(cell.cell.architecture for cell in tested)
    begun = "; ".join(f"{ARCHITECTURES[name]}: {' and '.join(map(_pretraining, CHECKPOINTS[name]))}" for name in models)
    versions = sorted({f"{name} {v}" for run in runs for name, v in run.get("versions", {}).items()})
    lacking = any(missing(cell) for cell in cells)
    return (
        f"{'; '.join(told) or 'Nothing is tested yet'}. Even seeds begin with the first pre-trained model of an "
        f"architecture, odd ones with the second, pre-trained apart{f' ({begun})' if begun else ''}. "
        f"{'Not all is there yet; the tables say what is missing. ' if lacking else ''}{', '.join(versions)}."
    )


def _pretraining(checkpoint: Path) -> str:
    if not (checkpoint / REPORT_FILE).is_file():
        return f"{checkpoint.name}, which is not here"
    settings = json.loads((checkpoint / REPORT_FILE).read_text())["settings"]
    return f"seed {settings['seed']}, {settings['language_steps']:,} steps"


def _verdicts(judged: Judged) -> str:
    tables = [_verdict_table(_titled("Verdicts", name, judged), own) for name, own in judged.items()]
    return "".join(tables) or '<p class="faint">Nothing is tested yet, so there is nothing to judge.</p>'


def _verdict_table(title: str, own: Sequence[tuple[str, Sequence[Verdict]]]) -> str:
    titles = [place for place, _ in own]
    head = "".join(f"<th>{html.escape(place)}</th>" for place in ("claim", *titles))
    rows = []
    for same in zip(*(found for _, found in own), strict=True):
        by = f'<div class="faint">By {_by(same[0])}: {html.escape(same[0].rule)}</div>'
        cells_ = "".join(map(_verdict, titles, same))
        rows.append(f'<tr><td class="claim">{html.escape(same[0].claim.text)}{by}</td>{cells_}</tr>')
    return (
        f'<h3>{html.escape(title)}</h3><div class="scroll"><table class="verdicts"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _verdict(title: str, verdict: Verdict) -> str:
    mark, kind = MARKS[verdict.outcome]
    evidence = f'<div class="faint">{html.escape(verdict.evidence)}</div>'
    told = f'<b class="{kind}">{mark} {verdict.outcome}</b>{evidence}'
    return f'<td class="verdict" data-label="{html.escape(title)}">{told}</td>'


def _answers(cell: CellOutcomes) -> str:
    firsts = {name: _first(cell.systems[name].runs) for name in ANSWERING if name in cell.systems}
    runs = {name: run for name, run in firsts.items() if run is not None}
    cards = "".join(card for task in (*PRETRAINED_TASKS, cell.cell.target) for card in _cards(task, cell, runs))
    inside = f'<div class="examples">{cards}</div>' if cards else "<p>No answers were kept.</p>"
    return _folded(cell.title, inside, cell.cell.base == "adamw")


def _folded(title: str, inside: str, opened: bool = False) -> str:
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>{inside}</details>"


def _first(runs: Mapping[int, Result]) -> Result | None:
    return next((run for _, run in sorted(runs.items()) if "answers" in run), None)


def _cards(task: str, cell: CellOutcomes, runs: Mapping[str, Result]) -> Iterable[str]:
    answers = {name: run["answers"][task] for name, run in runs.items()}
    count = min(map(len, answers.values()), default=0)
    if task in PRETRAINED_TASKS:
        examples: Sequence[Example] = pretrained_task_data(task, "test", count).examples
    else:
        examples = target_data(cell.cell.target, "test").examples[:count]  # type: ignore[arg-type]
    kinds = [len({given[i] for given in answers.values()}) for i in range(count)]
    most = [i for i in sorted(range(count), key=lambda i: -kinds[i])[:SHOWN] if kinds[i] > 1]
    for i in most or range(min(count, 1)):
        yield _card(task, examples[i], {SYSTEMS[name].marked: given[i] for name, given in answers.items()})


def _card(task: str, example: Example, answers: Mapping[str, str]) -> str:
    png = io.BytesIO()
    Image.fromarray(example.picture.transpose(1, 2, 0)).save(png, "PNG")
    said = "".join(
        f'<dt>{html.escape(name)}</dt><dd class="{"up" if answer == example.answer else "down"}">'
        f"{html.escape(answer) or '(nothing)'}</dd>"
        for name, answer in answers.items()
    )
    return (
        f'<div class="card"><img alt="" src="{embedded(png.getvalue())}"><div class="question">{html.escape(task)}: '
        f"{html.escape(example.question)}</div><dl><dt>right</dt><dd>{html.escape(example.answer)}</dd>{said}</dl></div>"
    )
