"""A comparison as one HTML page: numbers, layers, and pictures with the answers before and after."""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

from torch_mdgd.report.charts import lines
from torch_mdgd.report.comparison import OUTCOMES, SAME, Answer, Change, Compared, SetComparison, outcomes
from torch_mdgd.report.probes import Probe, is_right
from torch_mdgd.report.style import STYLE
from torch_mdgd.report.table import SCORES, headline, score_rows

SHOWN = 24
"""At most so many pictures of each outcome are on the page; the JSON has all answers."""
SIDE = 320
"""Longer sides of pictures are scaled to this, in pixels."""
TOLD = {
    "knowledge lost": "The right answer was the likeliest of those allowed, and is no more.",
    "form lost": "The right answer is still the likeliest of those allowed, but no longer what is said.",
    "answer lost": "The right answer was given, and is no more.",
    "gained": "What was wrong before is right now, in knowledge or in form.",
    "unchanged": "As right or as wrong as before.",
}


MEASURED = {
    "restricted": "knowledge, %",
    "exact": "exact answers, %",
    "kl": "KL(before ‖ after), nats a token",
    "drift": "drift of the last visual features, %",
}
"""By the ends of the names of ``Compared.numbers``."""


def page(comparison: Compared) -> str:
    """The whole page. It loads nothing: styles, drawings and pictures are in it."""
    title = headline(comparison)
    body = [
        f"<h1>{_text(title)}</h1>",
        '<p class="faint">Knowledge (restricted score): how often the right answer is the likeliest of those allowed. '
        "Exact: how often the generated answer is the right one, so its form counts too. ± is half a 95&nbsp;% "
        "interval of the change.</p>",
    ]
    if comparison.trace:
        body.append(_trace(comparison))
    for one, probes in zip(comparison.sets, comparison.pictures, strict=True):
        body.append(f"<h2>{_text(one.name.capitalize())}</h2>{_tiles(one)}{_scores(one)}{_layers(one)}")
        body.append(_answers(one, probes))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body>\n{''.join(body)}\n</body></html>\n"
    )


def _tiles(one: SetComparison) -> str:
    tiles = []
    if one.total.restricted is not None:
        tiles.append((_moved(one.total.restricted), f"knowledge, % of {one.total.count} probes"))
    tiles.append((_moved(one.total.exact), f"exact answers, % of {one.total.count} probes"))
    tiles.append(("–" if one.kl is None else f"{one.kl:.3f}", "KL(before ‖ after), nats a token of right answers"))
    last = one.layers[-1]
    ranks = " → ".join("–" if x is None else f"{x:.1f}" for x in (last.rank_before, last.rank_after))
    tiles.append((ranks, "effective rank of the last visual features"))
    tiles.append(("–" if last.drift is None else f"{last.drift:.1f} %", "drift of the last visual features"))
    inside = "".join(f'<div class="tile"><b>{value}</b><span>{_text(label)}</span></div>' for value, label in tiles)
    return f'<div class="tiles">{inside}</div>'


def _moved(change: Change) -> str:
    kind = "" if change.after == change.before else ' class="good"' if change.after > change.before else ' class="bad"'
    return f"{change.before:.1f} → <em{kind}>{change.after:.1f}</em>"


def _scores(one: SetComparison) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in SCORES)
    rows = []
    for row in score_rows(one):
        cells = "".join(f"<td>{_breaking(cell)}</td>" for cell in row)
        rows.append(f"<tr{' class=all' if row[0] == 'all' else ''}>{cells}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _breaking(cell: str) -> str:
    """A cell that may break before its interval."""
    value, sign, half = cell.partition(" ± ")
    return f"<span>{_text(value)}</span>" + (f" <span>± {_text(half)}</span>" if sign else "")


def _layers(one: SetComparison) -> str:
    at = [float(x.layer) for x in one.layers]
    ranks = {"before": [x.rank_before for x in one.layers], "after": [x.rank_after for x in one.layers]}
    drift: dict[str, Sequence[float | None]] = {"after": [x.drift for x in one.layers]}
    charts = (
        ("Effective rank of features z at image tokens", lines(at, ranks, "layer")),
        (
            "Drift of z, mean |z − z before| in % of mean |z before|",
            lines(at, drift, "layer", named=False),
        ),
    )
    figures = "".join(f"<figure><figcaption>{_text(told)}</figcaption>{svg}</figure>" for told, svg in charts)
    return f'<h3>Visual features by layer</h3><div class="charts">{figures}</div>'


def _trace(comparison: Compared) -> str:
    points = [comparison.start, *comparison.trace, {"step": comparison.step or 0, **comparison.numbers}]
    steps = [float(x["step"]) for x in points]
    figures = []
    for name in comparison.numbers:
        svg = lines(steps, {"after": [x.get(name) for x in points]}, "step", named=False)
        of, _, kind = name.rpartition("_")
        told = f"{of.replace('_', ' ').capitalize()}: {MEASURED[kind]}"
        figures.append(f"<figure><figcaption>{_text(told)}</figcaption>{svg}</figure>")
    return f'<h2>During training</h2><div class="charts">{"".join(figures)}</div>'


def _answers(one: SetComparison, probes: Sequence[Probe]) -> str:
    if not one.answers:
        return '<p class="faint">These probes are batches: nothing is generated, so there are no answers to show.</p>'
    counts, parts = outcomes(one), ["<h3>Answers</h3>"]
    for name in OUTCOMES:
        found = [(x, probe) for x, probe in zip(one.answers, probes, strict=True) if x.outcome == name]
        if not found:
            continue
        shown = found[:: -(-len(found) // SHOWN)]
        more = "" if len(shown) == len(found) else f" {len(shown)} of {len(found)} are shown, evenly spread."
        cards = "".join(_card(x, probe) for x, probe in shown)
        opened = " open" if len(parts) == 1 and name != SAME else ""
        parts.append(
            f"<details{opened}><summary>{_text(name.capitalize())}: {counts[name]}</summary>"
            f'<p class="faint">{TOLD[name]}{more}</p><div class="cards">{cards}</div></details>'
        )
    return "".join(parts)


def _card(answer: Answer, probe: Probe) -> str:
    cells = ["", "says", "likeliest", "right", answer.right, answer.right if probe.choices else "–"]
    kinds = ["faint"] * 4 + ["", ""]
    for name, given, chosen in zip(("before", "after"), answer.generated, answer.chosen, strict=True):
        cells += [name, given or "(nothing)", chosen or "–"]
        kinds += ["faint", _kind(is_right(given or "", answer.right)), _kind(chosen == answer.right) if chosen else ""]
    grid = "".join(f'<div class="{kind}">{_text(cell)}</div>' for cell, kind in zip(cells, kinds, strict=True))
    return (
        f'<div class="card"><img alt="{_text(answer.task)}" src="{_embedded(probe)}">'
        f'<p>{_text(answer.question)}</p><div class="said">{grid}</div></div>'
    )


def _kind(right: bool) -> str:
    return "good" if right else "bad"


def _embedded(probe: Probe) -> str:
    image = probe.image()
    image.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    kind: Any = "PNG" if len(image.getcolors(maxcolors=4096) or ()) else "JPEG"
    image.save(data, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _text(x: str) -> str:
    return html.escape(x)
