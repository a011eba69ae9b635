"""`oasis metrics`: the definition of every metric in a record."""

from __future__ import annotations

from typing import Annotated

from typer import Argument

from oasis_attn.cli.terminal import AsJson, print_json, print_table


def metrics(
    name: Annotated[
        str, Argument(metavar="NAME", help="A metric, or the first letters of several metrics.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Print the definition of each metric: formula, unit, direction, protocol and source.

    Without NAME, all metrics are listed.

    Example: [bold]oasis metrics outlier.avg_kurtosis[/bold]
    """
    from dataclasses import asdict

    from oasis_attn.metrics import definitions
    from oasis_attn.report.glossary import definition_table, glossary_table

    found = definitions(name)
    if as_json:
        print_json([asdict(each) for each in found])
    elif len(found) == 1:
        print_table(definition_table(found[0]))
    else:
        print_table(glossary_table(found))
