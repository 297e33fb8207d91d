"""A comparison as tables for the terminal: in colours where rich is installed, and in plain text."""

from collections.abc import Sequence

from torch_mdgd.report.comparison import Change, Compared, SetComparison, outcomes

LAYERS = 9
"""At most so many layers are printed, evenly spread; files have all of them."""
SCORES = ("task", "n", "chance", "knowledge", "exact")
SEEN = ("layer", "effective rank", "drift %")

Rows = list[tuple[str, ...]]


def plain(comparison: Compared) -> str:
    """All tables, aligned with spaces."""
    parts = [headline(comparison)]
    for one in comparison.sets:
        parts += [f"\n{one.name}", _aligned([SCORES, *score_rows(one)]), *(f"  {line}" for line in notes(one))]
        parts.append(_aligned([SEEN, *layer_rows(one)]))
    return "\n".join(parts)


def show(comparison: Compared) -> None:
    """Print the tables, by rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(plain(comparison))
        return
    console = Console()
    console.print(headline(comparison), highlight=False, markup=False)
    for one in comparison.sets:
        for title, head, rows in (
            (one.name, SCORES, score_rows(one)),
            (None, SEEN, layer_rows(one)),
        ):
            table = Table(title=title, title_justify="left", title_style="bold")
            for i, name in enumerate(head):
                table.add_column(name, justify="left" if i == 0 else "right")
            for row in rows:
                table.add_row(*row, style="bold" if row[0] == "all" else None)
            console.print(table, markup=False)
            if title:
                for line in notes(one):
                    console.print(line, highlight=False, markup=False)


def headline(comparison: Compared) -> str:
    """What is compared."""
    step = "" if comparison.step is None else f", step {comparison.step}"
    return f"Forgetting: {comparison.before} → {comparison.after}{step}"


def score_rows(one: SetComparison) -> Rows:
    """A row a task, then all: percent before → after, ± half a 95 % interval of the change."""
    found: Rows = []
    for score in [*one.scores, one.total] if len(one.scores) != 1 else one.scores:
        chance = "–" if score.chance is None else f"{score.chance:.1f}"
        found.append((score.task, str(score.count), chance, _both(score.restricted), _both(score.exact)))
    return found


def _both(change: Change | None) -> str:
    if change is None:
        return "–"
    half = f" ± {change.half:.1f}" if change.half else ""
    return f"{change.before:.1f} → {change.after:.1f}{half}"


def layer_rows(one: SetComparison, most: int = LAYERS) -> Rows:
    """A row a layer, the first and the last among them."""
    layers = one.layers
    if len(layers) > most:
        layers = tuple(layers[round(i * (len(layers) - 1) / (most - 1))] for i in range(most))
    return [(str(x.layer), f"{number(x.rank_before)} → {number(x.rank_after)}", number(x.drift)) for x in layers]


def notes(one: SetComparison) -> list[str]:
    """What is no table: KL and loss, and what became of answers."""
    kl = "not comparable: other vocabularies" if one.kl is None else f"{one.kl:.4f} nats a token"
    lines = [f"KL(before ‖ after) {kl}; loss of right answers {one.loss[0]:.3f} → {one.loss[1]:.3f} nats a token"]
    if one.answers:
        lines.append(", ".join(f"{count} {name}" for name, count in outcomes(one).items() if count))
    return lines


def number(x: float | None) -> str:
    """With two decimals; a dash for none."""
    return "–" if x is None else f"{x:.2f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        others = (x.rjust(width) for x, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join(["", row[0].ljust(widths[0]), *others]).rstrip())
    return "\n".join(lines)
