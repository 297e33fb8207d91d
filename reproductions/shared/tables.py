"""A table of text, for a terminal, a text file and a page."""

import html
from dataclasses import dataclass

from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """Cells of text.

    Attributes:
        title: above it.
        columns: heads; the first column is left-aligned.
        rows: as many cells each.
        notes: below it.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def markdown(self) -> str:
        head, *rows = ["| " + " | ".join(cells) + " |" for cells in (self.columns, *self.rows)]
        rule = "|---|" + "---:|" * (len(self.columns) - 1)
        return "\n".join([f"### {self.title}", "", head, rule, *rows, "", *(f"{note}\n" for note in self.notes)])

    @property
    def rich(self) -> RichTable:
        table = RichTable(title=self.title, caption="\n".join(self.notes), title_justify="left", caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="right" if i else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    @property
    def html(self) -> str:
        """With each cell's column as its `data-label`, which a narrow page can show in front of it."""
        head = "".join(f"<th>{html.escape(column)}</th>" for column in self.columns)
        rows = "".join(f"<tr>{self._cells(row)}</tr>" for row in self.rows)
        notes = "".join(f'<p class="faint">{html.escape(note)}</p>' for note in self.notes)
        return (
            f'<h3>{html.escape(self.title)}</h3><div class="scroll"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>{notes}"
        )

    def _cells(self, row: tuple[str, ...]) -> str:
        return "".join(
            f'<td data-label="{html.escape(column)}">{html.escape(cell).replace(" ± ", "&nbsp;±&nbsp;")}</td>'
            for column, cell in zip(self.columns, row, strict=True)
        )
