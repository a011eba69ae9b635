"""Tables in Markdown."""

from __future__ import annotations

from oasis_attn.report.tables import Table


def markdown(table: Table) -> str:
    """A GitHub table, with the title as a heading; text is left-aligned, numbers right-aligned."""
    rules = ("---" if index < table.text_columns else "---:" for index in range(len(table.columns)))
    lines = [table.columns, tuple(rules), *table.rows]
    body = "\n".join("| " + " | ".join(map(_escaped, line)) + " |" for line in lines)
    return f"### {table.title}\n\n{body}\n" if table.title else f"{body}\n"


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
