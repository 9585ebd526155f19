"""Tables of text, written as Markdown or as HTML. Cells are plain text, and escaped here."""

import html
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A head and rows of as many cells."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """Write a table as GitHub reads it."""
        rows = [tuple(map(_cell, row)) for row in self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.head, ("---",) * len(self.head), *rows)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Write a table whose first column names its rows."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.head)
        rows = []
        for first, *others in self.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
            rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
