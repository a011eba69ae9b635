"""`oasis report`: one page of any records and studies, with files of its figures and tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from oasis_attn.cli.terminal import AsJson, print_json


def report(
    record: Annotated[
        list[Path],
        Argument(
            metavar="RECORD",
            help="Records (.json, or .jsonl with one per line), folders with a record.json, or"
            " folders of studies.",
        ),
    ],
    out: Annotated[Path, Option(help="Write the page to this HTML file.")] = Path("report.html"),
    figures: Annotated[
        Path | None,
        Option(help="Write every figure to this folder, as PNG and SVG.", show_default=False),
    ] = None,
    tables: Annotated[
        Path | None,
        Option(help="Write every table to this folder, as CSV and LaTeX.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one page of any records, alone or side by side: what they say, figures and tables.

    Example: [bold]oasis report before.json after.json --out page.html --tables tables[/bold]
    """
    from oasis_attn.study.combined_report import write_combined_report

    written = write_combined_report(record, out, figures=figures, tables=tables)
    if as_json:
        print_json([str(path) for path in written])
    else:
        print("\n".join(str(path) for path in written))
