"""`oasis variants`: the methods that can be trained and compared."""

from __future__ import annotations

from oasis_attn.cli.terminal import AsJson, print_json, print_table


def variants(as_json: AsJson = False) -> None:
    """List the variants: each a name for settings of the architecture.

    Example: [bold]oasis variants --json[/bold]
    """
    from oasis_attn.modeling.variants import variants as every
    from oasis_attn.report import variants_table

    if as_json:
        print_json(every())
    else:
        print_table(variants_table(every()))
